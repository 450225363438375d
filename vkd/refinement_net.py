"""The label generator that is learned: a small perceptron, fitted on the rows whose class is verified."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int

from vkd.refinement import Net

NUM_HIDDEN, NUM_STEPS, LEARNING_RATE, WEIGHT_DECAY = 64, 200, 0.01, 0.01


def fit(features: Float[np.ndarray, "n f"], classes: Int[np.ndarray, " n"], num_classes: int) -> Net:
    """A net that names the classes of the rows, by cross entropy over all of them in each step: the same rows give the same net."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.from_numpy(features).double(), torch.from_numpy(classes)
    sizes = [(x.shape[1], NUM_HIDDEN), (NUM_HIDDEN, num_classes)]
    weights = [torch.randn(n, m, generator=generator, dtype=torch.float64).div(n**0.5).requires_grad_() for n, m in sizes]
    biases = [torch.zeros(m, dtype=torch.float64, requires_grad=True) for _, m in sizes]
    optimizer = torch.optim.AdamW([*weights, *biases], lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        logits = F.relu(x @ weights[0] + biases[0]) @ weights[1] + biases[1]
        F.cross_entropy(logits, y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    hidden, out = (weight.detach().numpy() for weight in weights)
    hidden_bias, out_bias = (bias.detach().numpy() for bias in biases)
    return Net(hidden, hidden_bias, out, out_bias)
