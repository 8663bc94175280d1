"""Does a policy ask its notes where they hold something, and leave them alone where they hold nothing?

    searchr1 recollection --out runs/tiny_qwen_recall
    searchr1 compare experiments/memory.py --out runs/cpu/memory --prices 0.2 --seeds 0 1 2 --questions 400

Of all passages a share rho is in the notes, in training and after it, as if so many entities had been asked about
before. Questions of one hop; a recall costs 0.02 of a right answer, a search 0.2. Half the steps of the default
training, from the adapter that was taught to recall by a coin. What is reported as reward leaves the price of a recall
out, and the choice regret is that of a world without notes: look at searches and recalls. Notebook 11 reads what this
leaves, or what ships in experiments/results/memory.
"""

import tempfile

from searchr1_lib.environment.memory import Recall
from searchr1_lib.records import Note
from searchr1_lib.rewards import Discounted
from searchr1_lib.search.memory import MemoryStore
from searchr1_lib.study.compare import Method
from searchr1_lib.study.recollection import noted
from searchr1_lib.study.warmstart import RECALL
from searchr1_lib.worlds.almanac import PRICE, UNKNOWN_PAYS

SHORT = {"scale_rewards": "batch", "steps": 30, "decay_steps": 15}
RECALL_COSTS = 0.02
ADAPTER = "data/tiny_qwen_recall"


def with_notes(rho):
    def tools(policy, engine):
        store = MemoryStore(tempfile.mkdtemp())
        store.add([Note(passage) for passage in noted(engine.passages, rho, 0)])
        return [engine, Recall(store, rule="nothing", name=RECALL)]

    reward = Discounted(PRICE, UNKNOWN_PAYS, {RECALL: RECALL_COSTS})
    return Method(SHORT, engine=tools, reward=reward, policy={"adapter": ADAPTER})


mixture = {"1-hop": 1.0}
methods = {
    "no_notes": Method(SHORT, policy={"adapter": ADAPTER}),
    "rho_0": with_notes(0.0),
    "rho_0.5": with_notes(0.5),
    "rho_0.9": with_notes(0.9),
}
