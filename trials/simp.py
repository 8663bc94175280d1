from searchr1_lib.worlds.almanac import *
from searchr1_lib.study.regret import *
import sys
w=build_world(0)
ids=[q.id for q in sample_questions(w,"validation",300)]
for sk in (skill_of("data/tiny_qwen"),READER):
    print(sk)
    for p in (.2,.3): print("  ",p,{k:round(v,3) for k,v in simple_policies(Yardstick(w,sk,p,.1),ids).items()})
