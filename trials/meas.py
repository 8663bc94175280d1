import sys,json,torch; torch.set_num_threads(1)
from dataclasses import asdict
from searchr1_lib.study.warmstart import measure, search_skill, TARGETS
from searchr1_lib.worlds.almanac import build_world
from searchr1_lib.training.policy import load_policy
from pathlib import Path
m=sys.argv[1]; k=int(sys.argv[2])
p=load_policy(m)
if k==0:
    sk=search_skill(p); print(sk); Path(m,"skill.json").write_text(json.dumps(asdict(sk)))
else:
    w=build_world(0)
    for n,(v,c) in measure(p,w,topk=k,generations=4).items(): print(k,n,round(v,3),c,TARGETS[n],flush=True)
