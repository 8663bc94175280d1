"""exp3.py MODEL '{json}': decisions by cost-sensitive classification on counterfactual pairs, replayed"""
import sys,time,json,random,collections,math,torch,copy
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
from searchr1_lib.training.trainer import questions_of
from searchr1_lib.search.bm25 import BM25Search
MODEL=sys.argv[1]; cfg=json.loads(sys.argv[2]); print("==",sys.argv[2],flush=True)
g=lambda k,d: cfg.pop(k,d)
PRICE=g("price",.2); U=.1; NE=g("n_eval",200); STEPS=g("steps",40); Q=g("q",32); PAIRS=g("pairs",2); B=g("batch",96); K=g("k",3); WIN=g("window",40); LR=g("lr",1.5e-3); OTHER=g("other",1); TOP=g("top",.1); OLR=g("other_lr",1e-3); seed=g("seed",100); DEV=g("devlog",0); CENT=g("cent",0.)
world=build_world(0); engine=BM25Search(world.passages)
policy=load_policy(MODEL,seed=seed); sk=skill_of(MODEL); reward=Discounted(PRICE,U)
val=sample_questions(world,"validation",NE)
y=R.Yardstick(world,sk,PRICE,U)
def show(tag,n=2):
    ts=rollout(policy,val,engine,generator=torch.Generator().manual_seed(1),**{**LIMITS,"num_generations":n,"batch_size":200})
    for t,r in zip(ts,reward(ts)): t.reward=r
    rows=R.table(y,ts); N=len(rows)
    reg=[r["regret"] for r in rows]; m=fmean(reg); se=(sum((x-m)**2 for x in reg)/N/(N-1))**.5
    print(f"{tag}: regret {m:.4f}±{se:.4f} reward {fmean(r['reward'] for r in rows):.3f} best {fmean(r['best'] for r in rows):.3f} malformed {fmean(t.invalid_turns>0 for t in ts):.3f} searches {fmean(len(t.searches) for t in ts):.2f} unknown {fmean((t.answer or '')=='unknown' for t in ts):.3f}",flush=True)
    by=collections.defaultdict(lambda:[0,0,0,0.])
    for t in ts:
        for d in y.decisions(t):
            k=("1hop" if "1-hop" in t.question.source else "more",) 
            b=by[(k[0] if d.state.searches==0 else "later",d.level)]; b[0]+=1; b[1]+=d.act in WORDINGS; b[2]+=d.act=="search full"; b[3]+=d.regret
    for part in ("1hop","more","later"): print("  ",part,{l:(b[0],round(b[1]/b[0],2),round(b[3]/b[0],3)) for (p,l),b in sorted(by.items(),key=lambda x:(x[0][0],-1 if x[0][1] is None else x[0][1])) if p==part},flush=True)
    kk=collections.defaultdict(list)
    for r in rows: kk[r["source"].split("/")[1]].append(r["regret"])
    print("   by kind",{a:round(fmean(b),3) for a,b in kk.items()},flush=True)
train=[blanked(q) for q in sample_questions(world,"train",1200,seed=seed)]
s=Settings(**{**LIMITS,"steps":STEPS,"questions_per_step":Q,"num_generations":2*PAIRS,"loss_type":"dapo","scale_rewards":"none","kl_every":0,"seed":seed,"learning_rate":OLR})
def own(ts,G):
    rows=[]
    for a in range(0,len(ts),G):
        grp=ts[a:a+G]
        for t in grp:
            same=[x.reward for x in grp if x.first_action==t.first_action]
            row=[(t.reward-fmean(same))*len(same)/max(1,len(same)-1)]*len(t.mask)
            if t.forced is not None: row[t.forced]=0.
            rows.append(row)
    from searchr1_lib.training.logits import padded
    mask=padded([t.mask for t in ts],0).bool(); ent=padded([t.token_values["entropy"] for t in ts],0.); q=ent[mask].quantile(1-TOP)
    return [[x if e>=q else 0. for x,e in zip(row,t.token_values["entropy"])] for t,row in zip(ts,rows)]
L=LM.Learner(policy,s,lambda l:None,own)
opt=torch.optim.AdamW(policy.parameters(),lr=LR,weight_decay=0.)
rng=random.Random(seed); buf=[]
head=policy.lm_head
def decide_update(items,lr):
    for gr in opt.param_groups: gr["lr"]=lr
    m=CENT*fmean(d for *_,d in items)
    tot=0.
    for p in policy.parameters(): p.grad=None
    for part in LM.micro_batches(items,4096,length=lambda it: len(it[0])):
        n=max(len(i) for i,*_ in part)
        ids=torch.tensor([i+[policy.pad_id]*(n-len(i)) for i,*_ in part])
        h=policy.decoder(input_ids=ids,use_cache=False).last_hidden_state
        h=h[torch.arange(len(part)),torch.tensor([len(i)-1 for i,*_ in part])].float()
        W=head.weight.float(); a=torch.tensor([p[1] for p in part]); b=torch.tensor([p[2] for p in part]); d=torch.tensor([p[3]-m for p in part])
        z=(h*(W[a]-W[b])).sum(1)
        loss=-(torch.sigmoid(z)*d).sum()/len(items)
        loss.backward(); tot+=float(loss.detach())
    torch.nn.utils.clip_grad_norm_(policy.parameters(),1.0); opt.step(); opt.zero_grad(set_to_none=True)
    return -tot
t0=time.time(); tr=tu=td=0
for step in range(STEPS):
    a=time.time()
    qs=questions_of(train,s,step)
    ts=rollout(policy,qs,engine,first_action=["search","answer"]*PAIRS,num_generations=2*PAIRS,generator=torch.Generator().manual_seed(seed*1_000_003+step),**s.limits())
    for t,r in zip(ts,reward(ts)): t.reward=r
    b=time.time()
    G=2*PAIRS; ds=[]
    for i in range(0,len(ts),G):
        grp=ts[i:i+G]; S=[t for t in grp if t.first_action=="search" and t.forced is not None]; A=[t for t in grp if t.first_action=="answer" and t.forced is not None]
        if not S or not A: continue
        d=fmean(t.reward for t in S)-fmean(t.reward for t in A); ds.append(d)
        t=rng.choice(S+A); buf.append((t.prompt_ids+t.completion_ids[:t.forced],S[0].completion_ids[S[0].forced],A[0].completion_ids[A[0].forced],d))
    del buf[:-WIN*Q]
    frac=min(1.,(STEPS-step)/(STEPS*.4))
    if OTHER:
        L.assign_advantages(ts); L.update(ts,step)
    c=time.time()
    J=[decide_update(rng.sample(buf,min(B,len(buf))),LR*max(.1,frac)) for _ in range(K)]
    e=time.time(); tr+=b-a; tu+=c-b; td+=e-c
    if step%5==0: print("  ",step,"reward S/A",round(fmean(t.reward for t in ts if t.first_action=="search"),3),round(fmean(t.reward for t in ts if t.first_action=="answer"),3),"d",round(fmean(ds),3),"J",round(fmean(J),4),"malformed",round(fmean(t.invalid_turns>0 for t in ts),3),"ent",round(fmean(e for t in ts for e,m in zip(t.token_values["entropy"],t.mask) if m),3),"s",round(b-a,1),round(c-b,1),round(e-c,1),flush=True)
print("trained",round(time.time()-t0),"rollout",round(tr),"other",round(tu),"decide",round(td),flush=True)
show("after")
