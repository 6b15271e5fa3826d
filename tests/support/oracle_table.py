"""With whom each recipe agrees: a part of the page that `recipe_pages.py` makes.

The numbers for TRL are measured by `trl_oracle.py`, and recorded in
`tests/bench/results/oracles.json`. The others were measured once, beside code that is not part of
any environment here: functions of the named commit, imported or taken from the source by name, on
the same random float64 tensors.
"""

from __future__ import annotations

import json
from pathlib import Path

RECORD = Path(__file__).resolve().parents[1] / "bench" / "results" / "oracles.json"
BEGIN = "<!-- oracles: made by tests/support/recipe_pages.py -->\n"
END = "<!-- end of oracles -->\n"

VERL, OPENRLHF, AREAL = "verl 1dda039", "OpenRLHF 3c3be62", "AReaL 4aef98d"
NOBODY = "nobody has it"

AGREES: dict[str, tuple[str, str]] = {
    "a_star_po": (
        "the gradient of the published square, by autograd, 1e-12",
        "the gradient is divided by 2 β2 and the longest answer allowed",
    ),
    "ar": ("its official code AR-Lopti cbeb333, read", "-"),
    "cispo": (f"{VERL} 4e-17", "the bound of 5 is TRL's recommendation, not the paper's"),
    "clip_cov": (f"{VERL}, read", "means and draw over an update, there over a micro-batch"),
    "cppo": (
        "lzhxmu/CPPO 52faeb3: the same count where a group divides evenly",
        "groups of 7, rate 0.5: 3 kept here as in the paper, 4 there, and it prunes over a "
        "process's whole batch",
    ),
    "dapo": (
        f"{VERL} 6e-17; {OPENRLHF}; {AREAL} with its penalty",
        "filters by reward",
    ),
    "deepseek_v32": (
        "",
        "the gap is to the old policy, in TRL to that of the moment",
    ),
    "disco": (
        "Optimization-AI/DisCO bd2b078 1e-15, and with its softmax 1e-16",
        "the divergence is over an update, there over a micro-batch of all ranks",
    ),
    "dppo": (f"{VERL}, both divergences, as formulas", "-"),
    "dr_grpo": ("understand-r1-zero dfca49d 0; verl 7e-18", "-"),
    "dro": (f"{VERL} and ROLL, read", "-"),
    "g2rpo_a": (
        "T-Lab G2RPO-A 0d98af8: the schedule by hand",
        "guidance is masked here, in the loss there",
    ),
    "flowrl": (
        "Xuekai-Zhu/FlowRL decbc57, read",
        "no head, no clip of the weight, no factor of 2β",
    ),
    "gdpo": ("TRL 1.16 advantages 1e-8", "verl's second deviation is over tokens"),
    "guide": ("vaskar-open-source-research/guide_rl 2f27715, read", "no mixin"),
    "igrpo": ("no official code was found", "-"),
    "vineppo": ("McGill-NLP/VinePPO efe7228, read; enumerated on a tree, 1e-12", "no KL"),
    "spo_chain": (
        "AIFrameResearch/SPO b9fc6a2, read",
        "sure tokens stay in the denominator, there they leave the loss",
    ),
    "spo_tree": (
        "AIFrameResearch/SPO b9fc6a2: advantages and dropped edges of 900 random trees, 0",
        "one denominator for an update, there a micro-batch; no whitening",
    ),
    "gmpo": (
        "callsys/GMPO 205b2bf 2e-7; verl 1e-9",
        "its deviation has 1e-8 added, ours 1e-6; verl's correction is a geometric mean",
    ),
    "gpg": ("AMAP-ML/GPG e096da8 0 for rewards of 0 and 1", "verl counts rewards before centring"),
    "grpo": (f"{VERL} 1e-9; {OPENRLHF} 1e-9", "they add 1e-8 to denominators"),
    "grpo_care": (
        "TencentARC/GRPO-CARE b0628fc, read",
        "the answer is found by a pattern, there by its tags",
    ),
    "grpo_lambda_both": ("SafeGRPOLogGrad 6e-17", "-"),
    "grpo_lambda_both_weight": (NOBODY, "equal to the ε-trace at the old policy"),
    "grpo_lambda_cut": ("exact enumeration 1e-14 without its bound", "the bound: 0.22 (median)"),
    "grpo_lambda_entropy_mask": (NOBODY, "-"),
    "grpo_lambda_recent": ("SafeGRPOLogGrad (quotes section 3.2, eq. 2) 6e-17", "-"),
    "grpo_lambda_recent_weight": (NOBODY, "equal to the ε-trace at the old policy"),
    "grpo_lambda_terminal": ("a fork of verl, read: the same weights", "-"),
    "grpo_opd": ("slime, read", "-"),
    "gspo": (f"{VERL} 1e-9; {AREAL} 5e-17", "verl gives tokens their own correction"),
    "icepop": (f"{OPENRLHF} 1e-10", "-"),
    "ktae": (
        "xiaolizh1/KTAE ea9fb77, read",
        "no frequencies; the last token has no key, there EOS",
    ),
    "kl_cov": (f"{VERL}, read", "the covariance is over an update, there over a micro-batch"),
    "krpo": ("billhhh/KRPO 0", "no KL"),
    "lambda_grpo": ("autograd of the published form 1e-17", "nobody runs it"),
    "lambda_grpo_prefix": (
        "grpo-prm 6bc58b1 1.7e-18",
        "their tree fails where one answer is a prefix of another",
    ),
    "lopti": (
        "zhyang2226/AR-Lopti cbeb333 6e-17",
        "no KL, no dual clip",
    ),
    "luspo": ("", "our loss is TRL's divided by the longest answer allowed"),
    "m2po": (f"{AREAL}, read", "over an update, there over a micro-batch"),
    "maxrl": ("maxrl c0698eb, read; enumerated for G = 4, 6, 8", "-"),
    "opsd": ("siyan-zhao/OPSD 590ec26, read", "the sampled form alone"),
    "opd": ("tinker-cookbook 9dfcc3a, read", "-"),
    "opo": (f"{VERL}, read", "-"),
    "pass_at_k": (f"{VERL}, read", "-"),
    "pods": (
        "YixuanEvenXu/pods: the same variance in 400 of 400 groups",
        "other members where rewards tie",
    ),
    "ppo": (
        "verl b178a3c: advantages, returns and the critic's loss, 1e-9",
        "it adds 1e-8 to denominators",
    ),
    "qae": ("the published cases for rewards of 0 and 1, all 2850", "the deviation is inferred"),
    "raft": (
        "Minimal-RL e3b49f0: the same advantages",
        "it keeps the dropped in its denominator, and a token mean",
    ),
    "reinforce_pp": (f"{VERL} and {OPENRLHF}, read", "-"),
    "reinforce_pp_baseline": (f"{VERL} and {OPENRLHF}, read", "-"),
    "reinforce_rej": (
        "Minimal-RL e3b49f0: the same advantages",
        "it keeps the dropped in its denominator, and a token mean",
    ),
    "remax": (f"{VERL}, read", "a greedy answer is one of the group"),
    "rloo": (f"{VERL} 2e-16", "-"),
    "s_trace_like": ("`gspo` in the uniform case 1e-12", "its formulas are not published"),
    "sapo": (f"{VERL}, read", "TRL keeps the temperatures in float32"),
    "tempo": ("fatebreaker/tempo 0a1c273, read; the definition, prefix by prefix, 1e-15", "-"),
    "top_entropy": (
        "",
        "the official code leaves the others out of the denominator: five times as large",
    ),
    "rc_grpo": ("no official code was found", "its second stage alone, no KL"),
    "rgr_grpo": ("no official code was found", "the constant of the shape is ours"),
    "ruscarl": (
        "IANNXANG/RuscaRL 18e2b01, read",
        "the rubric stands behind the question, there in the system message; no KL",
    ),
    "sgpo": ("no official code was found", "a third party's code has the other sign"),
    "rlsd": (
        "iie-ycx/RLSD 93e46f7 and ms-swift 3602360, read: the same formula",
        "the decay of the mix, which third parties have, is an option",
    ),
    "sdpo": (
        "lasgroup/SDPO 0e6d510, read",
        "the sampled path alone, and no clip of its importance weight",
    ),
    "spro": ("no official code was found", "the coefficient is ours"),
    "topr": ("ROLL, read", "-"),
    "tr_grpo": (NOBODY, "a reconstruction"),
    "vapo": (
        "as `ppo`, with its lambda of an answer",
        "the begin of the critic is ours",
    ),
    "vespo": (
        "FloyedShen/VESPO aa1f304, read",
        "TRL puts a correction for vLLM into W, here it weighs the surrogate",
    ),
}
"""Who else, to what difference; and where the recipe differs from them, and why."""


def table() -> str:
    """The rows of all recipes."""
    measured = json.loads(RECORD.read_text())
    lines = ["| recipe | agrees with, largest difference | where it differs |", "|---|---|---|"]
    for name, (others, differs) in sorted(AGREES.items()):
        found = measured.get(name)
        worst = None if found is None else max(found["loss"], found["gradient"])
        trl = "" if worst is None else f"**TRL 1.16 {worst:.0e}**"
        lines.append(f"| `{name}` | {'; '.join(x for x in (trl, others) if x)} | {differs} |")
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    """`text` with the table between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table()}{END}{after}"
