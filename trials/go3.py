import sys; from pathlib import Path
import torch; torch.set_num_threads(2)
from searchr1_lib.study import teach as T
from dataclasses import replace
T.COIN=(.5,)*7
rec=replace(T.LONGER,steps=1600,lr=1e-3,quantised_steps=1600,seed=2)
m,t,log=T.train(rec,start=Path("/tmp/hk2"),report=lambda l: print(l,flush=True))
T.save(Path("/tmp/hk3"),m,t,rec,log); print("saved",flush=True)
