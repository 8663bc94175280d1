"""exp2.py MODEL OUT '{json}': GRPO trial on the half-remembered world"""
import sys,time,json,random,collections,math,shutil,torch
torch.set_num_threads(int(__import__("os").environ.get("T","1")))
from statistics import fmean
from searchr1_lib.worlds.almanac import *
from searchr1_lib.worlds.optimum import *
from searchr1_lib.study import regret as R
from searchr1_lib.study.compare import LIMITS, blanked
from searchr1_lib.study.regret import skill_of
from searchr1_lib.rewards.cost import Discounted
from searchr1_lib.training.policy import load_policy
from searchr1_lib.training.rollout import rollout
from searchr1_lib.training import learner as LM
from searchr1_lib.training.settings import Settings
from searchr1_lib.training.trainer import Trainer
from searchr1_lib.search.bm25 import BM25Search
MODEL,OUT=sys.argv[1:3]; cfg=json.loads(sys.argv[3]); name=json.dumps(cfg)
PRICE=cfg.pop("price",.3); U=.1; variant=cfg.pop("variant","plain"); NE=cfg.pop("n_eval",400); CAP=cfg.pop("cap",.97); K=cfg.pop("kappa",1.); DEC=cfg.pop("decisions",0); CENTRE=cfg.pop("centre",0); OTHER=cfg.pop("other",1.)
world=build_world(0); engine=BM25Search(world.passages); seed=cfg.get("seed",100)
policy=load_policy(MODEL,seed=seed); sk=skill_of(MODEL)
reward=Discounted(PRICE,U)
val=sample_questions(world,"validation",NE)
def show(tag):
    ts=rollout(policy,val,engine,generator=torch.Generator().manual_seed(1),**{**LIMITS,"num_generations":2,"batch_size":200})
    for t,r in zip(ts,reward(ts)): t.reward=r
    y=R.Yardstick(world,sk,PRICE,U); rows=R.table(y,ts); n=len(rows)
    reg=[r["regret"] for r in rows]; m=fmean(reg); se=(sum((x-m)**2 for x in reg)/n/(n-1))**.5
    print(f"{tag}: regret {m:.4f}±{se:.4f} reward {fmean(r['reward'] for r in rows):.3f} best {fmean(r['best'] for r in rows):.3f} malformed {fmean(t.invalid_turns>0 for t in ts):.3f} searches {fmean(len(t.searches) for t in ts):.2f} unknown {fmean((t.answer or '')=='unknown' for t in ts):.3f} unparsed {fmean(not y.decisions(t) for t in ts):.3f}",flush=True)
    by=collections.defaultdict(lambda:[0,0,0,0.])
    for t in ts:
        for d in y.decisions(t):
            key=(("first" if d.state.searches==0 else "later"),d.level)
            b=by[key]; b[0]+=1; b[1]+=d.act in WORDINGS; b[2]+=d.act=="search full"; b[3]+=d.regret
    for part in ("first","later"): print("  ",part,{l:(b[0],round(b[1]/b[0],2),round(b[2]/max(1,b[1]),2),round(b[3]/b[0],3)) for (p,l),b in sorted(by.items(),key=lambda x:(x[0][0],-1 if x[0][1] is None else x[0][1])) if p==part},flush=True)
    k=collections.defaultdict(list)
    for r in rows: k[r["source"].split("/")[1]].append(r["regret"])
    print("   by kind",{a:round(fmean(b),3) for a,b in k.items()},flush=True)
import searchr1_lib.training.trainer as TT; TT.identity=lambda x: str(type(x))
adv=None
def mean(x): return sum(x)/len(x)
if variant=="paired":
    def adv(ts,G):
        rows=[]
        for g in range(0,len(ts),G):
            grp=ts[g:g+G]; parts=collections.defaultdict(list)
            for t in grp: parts[t.first_action].append(t)
            ms,ma=mean([t.reward for t in parts["search"]]),mean([t.reward for t in parts["answer"]])
            for t in grp:
                p=parts[t.first_action]; n=len(p)
                a=(t.reward-mean([x.reward for x in p]))*n/max(1,n-1)*OTHER
                row=[a]*len(t.mask)
                if t.forced is not None: row[t.forced]=K*((ms-ma) if t.first_action=="search" else (ma-ms))
                rows.append(row)
        if CENTRE:
            f=max(0.,1-len(CLOG)/(CENTRE*s.steps)); CLOG.append(1)
            ds=[rows[i][t.forced]*(1 if t.first_action=='search' else -1) for i,t in enumerate(ts) if t.forced is not None]; m=mean(ds)
            for i,t in enumerate(ts):
                if t.forced is not None: rows[i][t.forced]-=f*m*(1 if t.first_action=='search' else -1)
        if CRITIC: rows=critic(ts,rows)
        if DEC: rows=decide(ts,rows)
        return rows
    def blame(advn,lp,forced):
        f=forced.bool()
        stop=f&(advn>0)&(lp>math.log(CAP))|f&(advn<0)&(lp<math.log(1-CAP))
        return torch.where(stop,torch.zeros_like(advn),advn)
    LM._blame_what_it_would_do=blame
BUF=[]; CLOG=[]
WIN=cfg.pop("window",12); RIDGE=cfg.pop("ridge",1.0); CRITIC=cfg.pop("critic",0); OTHERS=cfg.pop("q_other",1)
def critic(ts,rows):
    L=HOLD[0].learner; idx=[i for i,t in enumerate(ts) if t.forced is not None]
    H={}
    with torch.no_grad():
        parts=[]
        for i in idx:
            t=ts[i]; t2=copy.copy(t); n=t.forced+1
            t2.completion_ids=t.completion_ids[:n]; t2.logprobs=t.logprobs[:n]; t2.advantages=[0.]*n; t2.mask=t.mask[:n]
            t2.segments=[__import__("dataclasses").replace(s,end=min(s.end,n)) for s in t.segments if s.start<n]
            t2.meta_i=i; parts.append(t2)
        for part in LM.micro_batches(parts,4096):
            hid,b=L._hidden(part)
            for k,t2 in enumerate(part): H[t2.meta_i]=hid[k,b.starts[k]+t2.forced].float()
    X=torch.stack([H[i] for i in idx]); sign=torch.tensor([1. if ts[i].first_action=="search" else -1. for i in idx])
    y=torch.tensor([rows[i][ts[i].forced] for i in idx])/K*sign   # group's difference
    BUF.append((X,y)); del BUF[:-WIN]
    XX=torch.cat([b[0] for b in BUF]); yy=torch.cat([b[1] for b in BUF])
    mu,sd=XX.mean(0),XX.std(0)+1e-6
    Z=torch.cat([(XX-mu)/sd/ X.shape[1]**.5,torch.ones(len(XX),1)],1); A=Z.T@Z; A[range(len(A)-1),range(len(A)-1)]+=RIDGE
    w=torch.linalg.solve(A,Z.T@yy)
    zx=torch.cat([(X-mu)/sd/X.shape[1]**.5,torch.ones(len(X),1)],1); d=zx@w
    if len(BUF)%5==0 or len(LOG)%10==0: print("   critic",len(LOG),"R2 in",round(float(1-((yy-Z@w)**2).mean()/yy.var()),3),"sd d",round(float(d.std()),3),"mean",round(float(d.mean()),3),flush=True)
    LOG.append(1)
    for i,dd,sg in zip(idx,d.tolist(),sign.tolist()): rows[i][ts[i].forced]=K*dd*sg
    return rows
LOG=[]; HOLD=[]
import copy
def decide(ts,rows):
    """only the DEC share of highest entropy"""
    from searchr1_lib.training.logits import padded
    mask=padded([t.mask for t in ts],0).bool(); ent=padded([t.token_values["entropy"] for t in ts],0.)
    q=ent[mask].quantile(1-DEC)
    return [[a if (e>=q or i==t.forced) else 0. for i,(a,e) in enumerate(zip(row,t.token_values["entropy"]))] for t,row in zip(ts,rows)]
import copy
_desc=TT.describe
def desc(ts,G):
    free=[t for t in ts if t.first_action is None]
    if free: return _desc(ts,G)
    olds=[t.first_action for t in ts]
    for t in ts: t.first_action=None
    try: return _desc(ts,G)
    finally:
        for t,o in zip(ts,olds): t.first_action=o
TT.describe=desc
_bw=LM.Learner._backward
def bw(self,ts,refs):
    out=[]
    for t in ts:
        n=max([i+1 for i,a in enumerate(t.advantages) if a] or [1])
        if n<len(t.mask):
            t2=copy.copy(t); t2.completion_ids=t.completion_ids[:n]; t2.logprobs=t.logprobs[:n]; t2.advantages=t.advantages[:n]; t2.mask=t.mask[:n]
            t2.segments=[__import__("dataclasses").replace(s,end=min(s.end,n)) for s in t.segments if s.start<n]
            if t2.forced is not None and t2.forced>=n: t2.forced=None
            t=t2
        out.append(t)
    return _bw(self,out,refs)
if cfg.pop("cut",0): LM.Learner._backward=bw
train=[blanked(q) for q in sample_questions(world,"train",1200,seed=seed)]
base=dict(steps=60,questions_per_step=16,num_generations=8,learning_rate=1.5e-3,loss_type="dapo",scale_rewards="none",kl_every=0,checkpoint_every=1000,seed=seed)
s=Settings(**{**base,**LIMITS,**cfg}) if not (variant=="paired") else None
if s is None:
    half=cfg.pop("half",3)
    s=Settings(**{**base,**LIMITS,**cfg}); object.__setattr__(s,"_half",half)
    Settings.first_actions=lambda self,step: ["search","answer"]*half+[None]*(self.num_generations-2*half)
shutil.rmtree(OUT,ignore_errors=True)
print("==",name,flush=True)
if cfg.get("steps")!=0:
    tr=Trainer(policy,train,engine,reward,s,OUT,report=None,advantages=adv)
    HOLD.append(tr); t0=time.time(); tr.train(); print("trained",round(time.time()-t0),"s")
    for m in tr.metrics[::max(1,s.steps//6)]: print("  ",{k:round(m[k],3) for k in ("step","reward","em","searches","malformed","entropy","grad_norm","seconds_rollout","seconds_update") if m.get(k) is not None})
show("after")
