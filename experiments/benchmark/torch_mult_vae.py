"""Trains Mult-VAE in PyTorch, whenever a line on stdin asks for it.

    python torch_mult_vae.py VARIANT TRAIN_NPZ SETTINGS_JSON

`training.py` starts this script with an interpreter that has PyTorch, NumPy and
SciPy. The script warms up, then reads 'SECONDS' from stdin, line by line, and
trains for that long. It answers every line with JSON on stdout.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.benchmark import machine
from vaecf.parallel import workers


class Dense(nn.Module):
    """The usual way: dense float32 rows from a SciPy matrix, log_softmax.

    The layers are items - hidden - 2 latent and latent - hidden - items.
    """

    def __init__(self, matrix: Any, config: dict[str, Any]) -> None:
        super().__init__()
        self.matrix = matrix
        n_items, hidden = matrix.shape[1], config["model"]["hidden"]
        latent = config["model"]["latent"]
        self.dropout = config["model"]["dropout_rate"]
        self.kl_weight = config["loss"]["anneal_cap"]
        inner = [*hidden, 2 * latent]
        outer = [latent, *reversed(hidden), n_items]
        self.first = nn.Linear(n_items, inner[0])
        self.encoder = nn.ModuleList(map(nn.Linear, inner[:-1], inner[1:]))
        self.decoder = nn.ModuleList(map(nn.Linear, outer[:-1], outer[1:]))

    def forward(self, users: np.ndarray, device: torch.device) -> Tensor:
        """Returns the mean loss of the users."""
        rows = self.matrix[users].toarray()
        return self.dense_loss(torch.from_numpy(rows).to(device))

    def dense_loss(self, x: Tensor) -> Tensor:
        """Returns the mean loss of dense rows x."""
        h = functional.dropout(functional.normalize(x), self.dropout)
        logits, kl = self.logits_and_kl(self.first(h))
        nll = -torch.sum(functional.log_softmax(logits, dim=1) * x, dim=1)
        return (nll + kl).mean()

    def logits_and_kl(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (logits, weighted KL) from the first layer's output."""
        for layer in self.encoder:
            h = layer(torch.tanh(h))
        mean, log_variance = h.float().chunk(2, dim=1)
        h = mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance)
        for layer in self.decoder[:-1]:
            h = torch.tanh(layer(h))
        kl = -0.5 * torch.sum(
            1 + log_variance - mean.pow(2) - log_variance.exp(), dim=1
        )
        return self.decoder[-1](h), self.kl_weight * kl


class Sparse(Dense):
    """The same mathematics by a careful author, without dense rows.

    The first layer is an EmbeddingBag with one row per item; dropout and norm
    are the weights of a user's items. The likelihood is gathered.
    """

    def __init__(self, matrix: Any, config: dict[str, Any]) -> None:
        super().__init__(matrix, config)
        weight = self.first.weight.detach().T.contiguous()
        self.bag = nn.EmbeddingBag.from_pretrained(
            weight, freeze=False, mode="sum"
        )
        self.bias = self.first.bias
        del self.first

    def forward(self, users: np.ndarray, device: torch.device) -> Tensor:
        """Returns the mean loss of the users."""
        rows = self.matrix[users]
        item, start = (
            torch.from_numpy(x.astype(np.int64)).to(device)
            for x in (rows.indices, rows.indptr)
        )
        count = start.diff()
        user = torch.repeat_interleave(count)
        keep = torch.rand(len(item), device=device) >= self.dropout
        norm = count.float().sqrt()[user] * (1 - self.dropout)
        h = self.bag(item, start[:-1], per_sample_weights=keep.float() / norm)
        logits, kl = self.logits_and_kl(h + self.bias)
        picked = logits.view(-1).gather(0, user * logits.shape[1] + item)
        target = torch.zeros_like(kl).index_add(0, user, picked)
        nll = count * torch.logsumexp(logits, dim=1) - target
        return (nll + kl).mean()


class Compiled(Dense):
    """For CUDA: rows made on the device, bf16 autocast, torch.compile."""

    def __init__(self, matrix: Any, config: dict[str, Any]) -> None:
        super().__init__(matrix, config)
        if not torch.cuda.is_available():
            sys.exit("PyTorch finds no CUDA device: leave this variant out")
        self.start, self.items = (
            torch.from_numpy(x.astype(np.int64)).cuda()
            for x in (matrix.indptr, matrix.indices)
        )
        self.program = torch.compile(self.dense_loss)

    def forward(self, users: np.ndarray, device: torch.device) -> Tensor:
        """Returns the mean loss of the users."""
        user = torch.from_numpy(users.astype(np.int64)).to(device)
        count = self.start[user + 1] - self.start[user]
        row = torch.repeat_interleave(count)
        first = torch.cumsum(count, 0) - count
        position = torch.arange(len(row), device=device)
        item = self.items[position + (self.start[user] - first)[row]]
        # 0 and 1 are exact in bf16.
        shape = (len(users), self.matrix.shape[1])
        x = torch.zeros(shape, dtype=torch.bfloat16, device=device)
        x[row, item] = 1
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return self.program(x)


VARIANTS = {
    "torch_dense": Dense,
    "torch_sparse": Sparse,
    "torch_compile_bf16": Compiled,
}


def main(name: str, file: str, settings: str) -> None:
    """Warms up, then trains whenever a line on stdin asks for it."""
    config, matrix = json.loads(settings), scipy.sparse.load_npz(file)
    torch.manual_seed(0)
    torch.set_num_threads(len(workers.cores()))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = VARIANTS[name](matrix, config).to(device)
    adam = torch.optim.Adam(
        model.parameters(),
        lr=config["optimizer"]["learning_rate"],
        fused=name == "torch_compile_bf16",
    )
    batch_size = config["train"]["batch_size"]
    user = np.random.default_rng(0).permutation(matrix.shape[0])
    full = user[: len(user) // batch_size * batch_size]
    order = itertools.cycle(full.reshape(-1, batch_size))

    def run(seconds: float) -> dict[str, Any]:
        steps, began = 0, time.perf_counter()
        while not steps or time.perf_counter() - began < seconds:
            adam.zero_grad()
            loss = model(next(order), device)
            loss.backward()
            adam.step()
            steps += 1
            if device.type == "cuda" and steps % 16 == 0:
                torch.cuda.synchronize()
        last_loss = loss.item()  # waits for the device
        spent = time.perf_counter() - began
        return {
            "users_per_second": steps * batch_size / spent,
            "loss": last_loss,
            "peak_rss_bytes": machine.peak_rss_bytes(),
            "peak_device_bytes": torch.cuda.max_memory_allocated(),
            "version": torch.__version__,
            "device": str(device),
        }

    run(0.0)  # warms up
    print(json.dumps(run(0.0)), flush=True)
    for line in sys.stdin:
        print(json.dumps(run(float(line))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
