"""A credit rule of your own: a token has credit in proportion to its entropy.

    .venv/bin/grpo-lambda train --config deploy/configs/tiny.yaml recipe=grpo \
        algorithm.credit.kind=deploy.examples.credit:by_entropy

Where the policy was sure there was little to decide, and little credit is due. Copy it anywhere on
PYTHONPATH and name it `package.module:function`. It is tried before anything starts.
"""

from __future__ import annotations

import torch

from common.config.algorithm import CreditConfig
from learner.algorithm.credit import Credit, CreditInputs


def by_entropy(inputs: CreditInputs, config: CreditConfig) -> Credit:
    """The weight of a token: its entropy over the mean entropy of its completion, so 1 on average.

    N trained tokens; the log-ratio stays as it is, so the clip is GRPO's.
    """
    assert inputs.entropy_N is not None  # a rule of your own is given all there is
    entropy_N = inputs.entropy_N.double()
    mean_N = inputs.axis.spread(inputs.axis.mean(entropy_N))
    weight_N = torch.where(mean_N > 0, entropy_N / mean_N, 1.0).to(inputs.log_ratio_N.dtype)
    return Credit(
        log_ratio_N=inputs.log_ratio_N,
        weight_N=weight_N,
        kl_weight_N=torch.ones_like(weight_N),
        gradient_weight_N=weight_N,
    )
