"""Mult-VAE in PyTorch, in a process that trains while ours waits.

A `Peer` starts this file with an interpreter that has PyTorch, NumPy and SciPy.
The process reads 'SECONDS' from stdin, line by line, trains for that long, and
answers each line with a line of JSON on stdout. Its memory and threads are
separate from ours, and all peers see the same machine in turns.

  torch_dense          the usual way: dense float32 rows from a SciPy matrix,
                       F.normalize, log_softmax, Adam.
  torch_sparse         the same mathematics by a careful author: EmbeddingBag as
                       first layer, likelihood gathered from the logits.
  torch_compile_bf16   for CUDA: interactions on the device, rows made dense
                       there, bf16 autocast, torch.compile, fused Adam.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import scipy.sparse

from experiments.benchmark import common
from vaecf.config import Config
from vaecf.errors import VaecfError

WARM_UP_STEPS = 2


# --- In our process ---------------------------------------------------------


class Peer:
    """A process with a PyTorch model, warmed up and waiting.

    Attributes:
      facts: {'version', 'device', 'threads'}.
    """

    def __init__(
        self, name: str, python: str, config: Config, train: Any, folder: str
    ) -> None:
        """Starts the process and waits until it has warmed up.

        Args:
          name: a key of `VARIANTS`.
          python: interpreter that has PyTorch.
          config: settings of the model.
          train: Interactions of the training users.
          folder: directory for the training data.

        Raises:
          VaecfError: the process fails; its error goes to our stderr.
        """
        self._name = name
        np.save(f"{folder}/indptr.npy", train.indptr)
        np.save(f"{folder}/indices.npy", train.indices)
        settings = json.dumps(config.to_dict())
        try:
            self._process = subprocess.Popen(
                [python, __file__, name, folder, str(train.n_items), settings],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": str(common.ROOT)},
            )
        except OSError as error:
            raise VaecfError(
                f"--peer_python={python} cannot be run: {error.strerror}"
            ) from None
        try:
            self.facts = self._answer()
        except BaseException:
            self.__exit__()
            raise

    def measure(self, seconds: float) -> dict[str, Any]:
        """Trains for about `seconds`, at least one step.

        Returns:
          {'users', 'seconds', 'loss', 'peak_rss_bytes', ...}.

        Raises:
          VaecfError: the process died.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `_answer` says why
            self._process.stdin.write(f"{seconds}\n")
            self._process.stdin.flush()
        return self._answer()

    def __enter__(self) -> Peer:
        """Returns the peer."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Ends the process."""
        self._process.terminate()
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return json.loads(line)
        status = self._process.wait()
        raise VaecfError(
            f"--peers={self._name}: the process ended with status {status}; "
            "its error is above"
        )


# --- In the peer's process --------------------------------------------------


def make_model(torch: Any, n_items: int, config: dict[str, Any]) -> Any:
    """Returns layers items - hidden - 2 latent and latent - hidden - items.

    `model(x)` is the mean loss of dense rows x. `model.loss(h, nll)` is the
    mean loss of the first layer's output h, with `nll` a function from logits
    to the negative log-likelihood.
    """
    nn, functional = torch.nn, torch.nn.functional
    hidden, latent = config["model"]["hidden"], config["model"]["latent"]
    kl_weight = config["loss"]["anneal_cap"]

    class MultVAE(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.dropout = config["model"]["dropout_rate"]
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
            return (nll(self.decoder[-1](h)) + kl_weight * kl).mean()

        def forward(self, x: Any) -> Any:
            def nll(logits: Any) -> Any:
                log_p = functional.log_softmax(logits, dim=1)
                return -torch.sum(log_p * x, dim=1)

            h = functional.dropout(functional.normalize(x), self.dropout)
            return self.loss(self.first(h), nll)

    return MultVAE()


# Each of these functions returns (function from users to their mean loss,
# trained parameters).


def dense(torch: Any, model: Any, train: Any, device: Any) -> tuple:
    """Makes dense float32 rows on the host."""

    def loss_of(users: np.ndarray) -> Any:
        return model(torch.from_numpy(train[users].toarray()).to(device))

    return loss_of, list(model.parameters())


def sparse(torch: Any, model: Any, train: Any, device: Any) -> tuple:
    """Sums rows of the input weights instead of a dense product, in float32.

    The input weights are transposed, one row per item, in an EmbeddingBag. The
    dropout and the norm are the weights of a user's items.
    """
    n_items, width = model.first.in_features, model.first.out_features
    bag = torch.nn.EmbeddingBag(n_items, width, mode="sum").to(device)
    with torch.no_grad():
        bag.weight.copy_(model.first.weight.T)
    bias = model.first.bias
    # The transposed copy replaces the weights of the dense layer.
    model.first.weight = None

    def loss_of(users: np.ndarray) -> Any:
        rows = train[users]
        counts = np.diff(rows.indptr)
        item = torch.from_numpy(rows.indices.astype(np.int64)).to(device)
        start = torch.from_numpy(rows.indptr[:-1].astype(np.int64)).to(device)
        count = torch.from_numpy(counts.astype(np.int64)).to(device)
        user = torch.repeat_interleave(count)
        keep = (torch.rand(len(item), device=device) >= model.dropout).float()
        norm = count.clamp(min=1).float().sqrt()[user] * (1 - model.dropout)

        def nll(logits: Any) -> Any:
            picked = torch.gather(logits.view(-1), 0, user * n_items + item)
            target = torch.zeros(len(users), device=device).index_add(
                0, user, picked
            )
            return count * torch.logsumexp(logits, dim=1) - target

        h = bag(item, start, per_sample_weights=keep / norm) + bias
        return model.loss(h, nll)

    return loss_of, [*model.parameters(), *bag.parameters()]


def compiled(torch: Any, model: Any, train: Any, device: Any) -> tuple:
    """Keeps everything on the device, in bf16 where autocast allows it."""
    start = torch.from_numpy(train.indptr.astype(np.int64)).to(device)
    items = torch.from_numpy(train.indices.astype(np.int64)).to(device)
    n_items = train.shape[1]
    program = torch.compile(model)

    def loss_of(users: np.ndarray) -> Any:
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
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return program(x)

    return loss_of, list(model.parameters())


VARIANTS = {
    "torch_dense": dense,
    "torch_sparse": sparse,
    "torch_compile_bf16": compiled,
}


def batches(n_users: int, batch_size: int) -> Iterator[np.ndarray]:
    """Yields the full batches of one shuffled epoch after the other."""
    rng = np.random.default_rng(0)
    while True:
        order = rng.permutation(n_users)
        for start in range(0, n_users - batch_size + 1, batch_size):
            yield order[start : start + batch_size]


def load(folder: str, n_items: int) -> scipy.sparse.csr_matrix:
    """Returns the training matrix, float32 [users, items]."""
    indptr = np.load(f"{folder}/indptr.npy")
    indices = np.load(f"{folder}/indices.npy")
    ones = np.ones(len(indices), np.float32)
    return scipy.sparse.csr_matrix(
        (ones, indices, indptr), shape=(len(indptr) - 1, n_items)
    )


def main(name: str, folder: str, n_items: str, settings: str) -> None:
    """Warms up, then trains whenever a line on stdin asks for it."""
    import torch

    config = json.loads(settings)
    torch.manual_seed(0)
    torch.set_num_threads(common.cores())
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    if name == "torch_compile_bf16" and not cuda:
        sys.exit("PyTorch finds no CUDA device; leave out torch_compile_bf16")
    train = load(folder, int(n_items))
    model = make_model(torch, train.shape[1], config).to(device)
    loss_of, parameters = VARIANTS[name](torch, model, train, device)
    adam = torch.optim.Adam(
        parameters,
        lr=config["optimizer"]["learning_rate"],
        fused=name == "torch_compile_bf16",
    )
    order = batches(train.shape[0], config["train"]["batch_size"])

    def run(seconds: float, at_least: int = 1) -> dict[str, Any]:
        users = steps = 0
        began = time.perf_counter()
        while steps < at_least or time.perf_counter() - began < seconds:
            batch = next(order)
            adam.zero_grad()
            loss = loss_of(batch)
            loss.backward()
            adam.step()
            users += len(batch)
            steps += 1
            if cuda and steps % 16 == 0:
                torch.cuda.synchronize()
        last_loss = float(loss)  # waits for the device
        return {
            "users": users,
            "seconds": time.perf_counter() - began,
            "loss": last_loss,
            "peak_rss_bytes": common.peak_rss_bytes(),
            "peak_device_bytes": torch.cuda.max_memory_allocated(),
        }

    run(0.0, WARM_UP_STEPS)
    facts = {
        "version": torch.__version__,
        "device": torch.cuda.get_device_name() if cuda else common.processor(),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        print(json.dumps(run(float(line))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
