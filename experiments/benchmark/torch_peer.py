"""Mult-VAE in PyTorch, as a process that trains when it is told to.

Started by `peers.py` with whichever interpreter has PyTorch; needs nothing
else but NumPy and SciPy. Reads 'measure SECONDS' from stdin, line by line,
and answers each with a line of JSON on stdout.

  torch_dense          as people write it: dense float32 rows out of a SciPy
                       matrix, F.normalize, log_softmax, Adam.
  torch_sparse         the same mathematics by a careful writer: EmbeddingBag
                       as first layer, likelihood gathered from the logits.
  torch_compile_bf16   for CUDA: interactions resident, rows made dense on the
                       device, bf16 autocast, torch.compile, fused Adam.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import machine
import numpy as np
import scipy.sparse

LEARNING_RATE = 1e-3
DROPOUT = 0.5
KL_WEIGHT = 0.2
WARM_UP_STEPS = 2


def make_model(torch: Any, n_items: int, hidden: list[int], latent: int) -> Any:
    """Layers items - hidden - 2 latent and latent - hidden - items.

    `model(x)` is the mean loss of dense rows x, `model.loss(h, nll)` that of
    what the first layer gave and a function from logits to the likelihood.
    """
    nn, functional = torch.nn, torch.nn.functional

    class MultVAE(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            inner = [*hidden, 2 * latent]
            outer = [latent, *reversed(hidden), n_items]
            self.first = nn.Linear(n_items, inner[0])
            self.encoder = nn.ModuleList(
                nn.Linear(a, b) for a, b in itertools.pairwise(inner)
            )
            self.decoder = nn.ModuleList(
                nn.Linear(a, b) for a, b in itertools.pairwise(outer)
            )

        def loss(self, h: Any, nll: Callable[[Any], Any]) -> Any:
            for layer in self.encoder:
                h = layer(torch.tanh(h))
            mean, log_variance = h.float().chunk(2, dim=1)
            noise = torch.randn_like(mean)
            h = mean + noise * torch.exp(0.5 * log_variance)
            for layer in self.decoder[:-1]:
                h = torch.tanh(layer(h))
            kl = -0.5 * torch.sum(
                1 + log_variance - mean.pow(2) - log_variance.exp(), dim=1
            )
            return (nll(self.decoder[-1](h)) + KL_WEIGHT * kl).mean()

        def forward(self, x: Any) -> Any:
            def nll(logits: Any) -> Any:
                log_p = functional.log_softmax(logits, dim=1)
                return -torch.sum(log_p * x, dim=1)

            h = functional.dropout(functional.normalize(x), DROPOUT)
            return self.loss(self.first(h), nll)

    return MultVAE()


def dense_step(torch: Any, model: Any, train: Any, device: Any) -> Callable:
    """Dense rows from the host, float32."""
    adam = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)

    def step(users: np.ndarray) -> Any:
        x = torch.from_numpy(train[users].toarray()).to(device)
        adam.zero_grad()
        loss = model(x)
        loss.backward()
        adam.step()
        return loss

    return step


def sparse_step(torch: Any, model: Any, train: Any, device: Any) -> Callable:
    """Sums of rows instead of a dense first layer, float32.

    The input weights are kept transposed, a row an item, in an EmbeddingBag;
    dropout and norm are the weights of a user's items.
    """
    n_items, width = model.first.in_features, model.first.out_features
    bag = torch.nn.EmbeddingBag(n_items, width, mode="sum").to(device)
    with torch.no_grad():
        bag.weight.copy_(model.first.weight.T)
    bias = model.first.bias
    # The transposed copy takes the place of the dense layer's weights.
    model.first.weight = None
    adam = torch.optim.Adam(
        [*model.parameters(), *bag.parameters()], lr=LEARNING_RATE
    )

    def step(users: np.ndarray) -> Any:
        rows = train[users]
        counts = np.diff(rows.indptr)
        item = torch.from_numpy(rows.indices.astype(np.int64)).to(device)
        start = torch.from_numpy(rows.indptr[:-1].astype(np.int64)).to(device)
        count = torch.from_numpy(counts.astype(np.int64)).to(device)
        user = torch.repeat_interleave(count)
        keep = (torch.rand(len(item), device=device) >= DROPOUT).float()
        norm = count.clamp(min=1).float().sqrt()[user] * (1 - DROPOUT)

        def nll(logits: Any) -> Any:
            picked = torch.gather(logits.view(-1), 0, user * n_items + item)
            target = torch.zeros(len(users), device=device).index_add(
                0, user, picked
            )
            return count * torch.logsumexp(logits, dim=1) - target

        adam.zero_grad()
        h = bag(item, start, per_sample_weights=keep / norm) + bias
        loss = model.loss(h, nll)
        loss.backward()
        adam.step()
        return loss

    return step


def compiled_step(torch: Any, model: Any, train: Any, device: Any) -> Callable:
    """Everything on the device; bf16 where autocast allows it."""
    adam = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)
    start = torch.from_numpy(train.indptr.astype(np.int64)).to(device)
    items = torch.from_numpy(train.indices.astype(np.int64)).to(device)
    n_items = train.shape[1]
    program = torch.compile(model)

    def step(users: np.ndarray) -> Any:
        user = torch.from_numpy(users.astype(np.int64)).to(device)
        count = start[user + 1] - start[user]
        row = torch.repeat_interleave(count)
        first = torch.cumsum(count, 0) - count
        position = torch.arange(len(row), device=device)
        item = items[position + (start[user] - first)[row]]
        # 0 and 1 are exact in bf16.
        x = torch.zeros(
            (len(users), n_items), dtype=torch.bfloat16, device=device
        )
        x[row, item] = 1
        adam.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = program(x)
        loss.backward()
        adam.step()
        return loss

    return step


STEPS = {
    "torch_dense": dense_step,
    "torch_sparse": sparse_step,
    "torch_compile_bf16": compiled_step,
}


def load(directory: pathlib.Path, n_items: int) -> scipy.sparse.csr_matrix:
    """The training matrix that `peers.py` wrote, float32."""
    indptr = np.load(directory / "indptr.npy")
    indices = np.load(directory / "indices.npy")
    ones = np.ones(len(indices), np.float32)
    return scipy.sparse.csr_matrix(
        (ones, indices, indptr), shape=(len(indptr) - 1, n_items)
    )


def batches(n_users: int, batch_size: int) -> Iterator[np.ndarray]:
    """Whole batches of one shuffled epoch after the other, for ever."""
    rng = np.random.default_rng(0)
    while True:
        order = rng.permutation(n_users)
        for start in range(0, n_users - batch_size + 1, batch_size):
            yield order[start : start + batch_size]


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mode", choices=sorted(STEPS), required=True)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--n_items", type=int, required=True)
    parser.add_argument("--hidden", type=int, nargs="+", required=True)
    parser.add_argument("--latent", type=int, required=True)
    parser.add_argument("--batch_size", type=int, required=True)
    return parser.parse_args()


def main() -> None:
    """Warms up, then measures whenever a line asks for it."""
    import torch

    args = _arguments()
    torch.manual_seed(0)
    torch.set_num_threads(machine.cores())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.mode == "torch_compile_bf16" and device.type != "cuda":
        _say({"error": "PyTorch sees no CUDA device; leave this peer out"})
        return
    model = make_model(torch, args.n_items, args.hidden, args.latent)
    train = load(args.data, args.n_items)
    step = STEPS[args.mode](torch, model.to(device), train, device)
    order = batches(train.shape[0], args.batch_size)

    def run(seconds: float, at_least: int) -> dict[str, Any]:
        users, steps, first_loss = 0, 0, None
        began = time.perf_counter()
        while steps < at_least or time.perf_counter() - began < seconds:
            batch = next(order)
            loss = step(batch).detach()
            first_loss = loss if first_loss is None else first_loss
            users += len(batch)
            steps += 1
            if device.type == "cuda" and steps % 16 == 0:
                torch.cuda.synchronize()
        last_loss = float(loss)  # waits for the device
        return {
            "users": users,
            "steps": steps,
            "seconds": time.perf_counter() - began,
            "loss": last_loss,
            "first_loss": float(first_loss),
            "peak_rss_bytes": machine.peak_rss_bytes(),
        }

    run(0.0, WARM_UP_STEPS)
    _say(
        {
            "version": torch.__version__,
            "device": torch.cuda.get_device_name()
            if device.type == "cuda"
            else machine.processor(),
            "threads": torch.get_num_threads(),
        }
    )
    for line in sys.stdin:
        answer = run(float(line.split()[1]), 1)
        if device.type == "cuda":
            answer["peak_device_bytes"] = torch.cuda.max_memory_allocated()
        _say(answer)


if __name__ == "__main__":
    main()
