from searchr1_lib.worlds.almanac import *
from searchr1_lib.study.regret import *
import sys
w=build_world(0)
ids=[q.id for q in sample_questions(w,"validation",300)]
for sk in (skill_of("/tmp/hk2"),READER):
    print(sk)
    for p in (.15,.18,.2,.22,.25): print("  ",p,{k:round(v,3) for k,v in simple_policies(Yardstick(w,sk,p,.1),ids).items()})
