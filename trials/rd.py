import sys,random,torch,collections; torch.set_num_threads(1)
from searchr1_lib.worlds.almanac import *
from searchr1_lib.training.policy import load_policy
from searchr1_lib.training.rollout import rollout
from searchr1_lib.search.bm25 import BM25Search
from searchr1_lib.study.compare import LIMITS
from searchr1_lib.study.regret import hops_found
from searchr1_lib.metrics import exact_match
w=build_world(0); e=BM25Search(w.passages)
fresh=[q for part in w.questions.values() for q in part if q.source.split("/")[2] in("0","00")]
for quant in (True,False):
  p=load_policy(sys.argv[1],quantize=quant,lora=False)
  for temp in (1.0,0.5,0.0):
    for kind in ("1-hop","comparison"):
      qs=[q for q in fresh if q.source.split("/")[1]==kind]; random.Random(0).shuffle(qs)
      ts=rollout(p,qs[:60],e,num_generations=2,first_action="search",temperature=temp,generator=torch.Generator().manual_seed(0),**LIMITS|{"topk":int(sys.argv[2])})
      full=[t for t in ts if hops_found(w,t)==t.question.hops]
      ok=[exact_match(t.answer,t.question.answers) for t in full]
      print("nf4" if quant else "fp32",temp,kind,len(full),round(sum(ok)/max(1,len(ok)),3),flush=True)
      if temp==1.0 and quant:
        for t,o in list(zip(full,ok)):
          if not o and random.random()<.35:
            print("   Q",t.question.text,t.question.answers,"->",t.answer); print("     ",t.text[-420:].replace("\n"," / "))
