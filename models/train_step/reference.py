"""One optimizer step in plain eager torch: what an exported train step is compared with.

It shares nothing with the traced step but the module, the task's metric, the dropout mask and DP-SGD's noise:
gradients come from autograd (sample by sample, for DP-SGD), the loss from torch's own functions, the update from
`torch.optim`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from models.flat import FloatVector, flatten_buffers, flatten_params, load_flat, params_of
from models.task import Task
from models.train_step.dropout import CounterDropout
from models.train_step.optimizers import ADAM_BETA1, ADAM_BETA2, ADAM_EPSILON
from models.train_step.sample_privacy import SamplePrivacy


@dataclass(frozen=True, slots=True)
class Hyper:
    """The scalar inputs of a step."""

    lr: float
    momentum: float
    weight_decay: float
    mu: float


@dataclass(frozen=True, slots=True)
class State:
    """The flat vectors that a step moves: `float32 [P]`, `[S]`, `[Q]`."""

    params: FloatVector
    opt_state: FloatVector
    buffers: FloatVector


@dataclass(frozen=True, slots=True)
class Batch:
    """One step: samples `float32 [B, …]`, labels `int64 [B]`, weights `float32 [B]`, DP-SGD's noise `float32 [P]`."""

    x: npt.NDArray[np.float32]
    y: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]
    noise: FloatVector


class EagerStep:
    """Steps a private copy of a module.

    Args:
        module: the model; it is copied.
        task: its task.
        optimizer: "sgd" or "adam".
        privacy: steps are DP-SGD's, sample by sample.
    """

    def __init__(
        self, module: nn.Module, task: Task, optimizer: str, privacy: SamplePrivacy | None = None
    ) -> None:
        self._module = copy.deepcopy(module).cpu().train()
        self._task = task
        self._optimizer = optimizer
        self._privacy = privacy

    def run(
        self, state: State, batch: Batch, hyper: Hyper, anchor: FloatVector, seed: int, step: int
    ) -> tuple[State, float, float]:
        """The state after one step from `state`, the loss and the metric of the batch."""
        load_flat(self._module, state.params, state.buffers)
        params = list(params_of(self._module).values())
        if self._privacy is None:
            loss, metric = self._backward(params, batch, seed, step)
        else:
            loss, metric = self._private_backward(params, batch, self._privacy, seed, step)
        self._add_proximal_term(params, hyper.mu, anchor)
        optimizer = self._torch_optimizer(params, hyper, state.opt_state)
        optimizer.step()
        after = State(
            flatten_params(self._module), self._opt_state(optimizer, params), flatten_buffers(self._module)
        )
        return after, loss, metric

    def _backward(self, params: list[Tensor], batch: Batch, seed: int, step: int) -> tuple[float, float]:
        """Gradients of the weighted mean loss; loss and metric of the batch."""
        x, y = torch.from_numpy(batch.x), torch.from_numpy(batch.y)
        shares = torch.from_numpy(batch.weights / batch.weights.sum())
        for param in params:
            param.grad = None
        with CounterDropout(torch.tensor(seed), torch.tensor(step)):
            outputs = self._module(x)
        loss = (self._losses(outputs, x, y) * shares).sum()
        torch.autograd.backward(loss)
        metric = (self._task.sample_metrics(outputs.detach(), x, y) * shares).sum()
        return float(loss.detach()), float(metric)

    def _private_backward(
        self, params: list[Tensor], batch: Batch, privacy: SamplePrivacy, seed: int, step: int
    ) -> tuple[float, float]:
        """One backward for each sample that counts, clipped in float64, and the noise of the step on their sum."""
        counted = np.flatnonzero(batch.weights > 0)
        total = np.zeros(sum(param.numel() for param in params))
        losses, metrics = [], []
        for place in counted:
            row = slice(place, place + 1)
            one = Batch(batch.x[row], batch.y[row], np.ones(1, np.float32), batch.noise)
            loss, metric = self._backward(params, one, seed, step)
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
            own = torch.cat([grad.reshape(-1) for grad in grads]).double().numpy()
            total += own * min(1.0, privacy.clipping_norm / max(float(np.linalg.norm(own)), 1e-300))
            losses.append(loss)
            metrics.append(metric)
        total += privacy.noise_multiplier * privacy.clipping_norm * batch.noise
        mean = torch.from_numpy((total / len(counted)).astype(np.float32))
        for param, part in zip(params, torch.split(mean, [p.numel() for p in params]), strict=True):
            param.grad = part.reshape(param.shape).clone()
        return float(np.mean(losses)), float(np.mean(metrics))

    def _losses(self, outputs: Tensor, x: Tensor, y: Tensor) -> Tensor:
        if self._task.kind == "classification":
            return functional.cross_entropy(outputs, y, reduction="none")
        return functional.mse_loss(outputs, x, reduction="none").flatten(1).mean(1)

    @staticmethod
    def _add_proximal_term(params: list[Tensor], mu: float, anchor: FloatVector) -> None:
        start = 0
        for param in params:
            centre = torch.from_numpy(anchor[start : start + param.numel()]).reshape(param.shape)
            gradient = torch.zeros_like(param) if param.grad is None else param.grad
            param.grad = gradient + mu * (param.detach() - centre)
            start += param.numel()

    def _torch_optimizer(
        self, params: list[Tensor], hyper: Hyper, opt_state: FloatVector
    ) -> torch.optim.Optimizer:
        vector = torch.from_numpy(opt_state.copy())
        sizes = [param.numel() for param in params]
        total = sum(sizes)
        if self._optimizer == "sgd":
            sgd = torch.optim.SGD(params, hyper.lr, hyper.momentum, weight_decay=hyper.weight_decay)
            for param, velocity in zip(params, torch.split(vector, sizes), strict=True):
                sgd.state[param] = {"momentum_buffer": velocity.reshape(param.shape).clone()}
            return sgd
        betas = (ADAM_BETA1, ADAM_BETA2)
        adam = torch.optim.Adam(params, hyper.lr, betas, ADAM_EPSILON, hyper.weight_decay)
        firsts, seconds = torch.split(vector[:total], sizes), torch.split(vector[total:-1], sizes)
        for param, first, second in zip(params, firsts, seconds, strict=True):
            adam.state[param] = {
                "step": vector[-1].clone(),
                "exp_avg": first.reshape(param.shape).clone(),
                "exp_avg_sq": second.reshape(param.shape).clone(),
            }
        return adam

    def _opt_state(self, optimizer: torch.optim.Optimizer, params: list[Tensor]) -> FloatVector:
        if self._optimizer == "sgd":
            parts = [optimizer.state[param]["momentum_buffer"] for param in params]
        else:
            parts = [optimizer.state[param][name] for name in ("exp_avg", "exp_avg_sq") for param in params]
            parts.append(optimizer.state[params[0]]["step"])
        return torch.cat([part.reshape(-1) for part in parts]).numpy()


def adam_params(before: FloatVector, opt_state: FloatVector, lr: float) -> npt.NDArray[np.float64]:
    """Where Adam moves `before`, given the state after the step, in float64."""
    size = before.size
    first, second = opt_state[:size].astype(np.float64), opt_state[size : 2 * size].astype(np.float64)
    count = float(opt_state[-1])
    first_hat = first / (1 - ADAM_BETA1**count)
    second_hat = second / (1 - ADAM_BETA2**count)
    moved: npt.NDArray[np.float64] = before - lr * first_hat / (np.sqrt(second_hat) + ADAM_EPSILON)
    return moved
