"""What the drop-ins share: rows of affine_step in place of a step's arithmetic.

A drop-in is diffusers' own class, whose configuration, time grids and files it inherits; what happens to a tensor is
its own: ``step`` names its row by a key (all that its coefficients depend on: the index of the step, the order, eta),
``_row`` makes the columns of a key in float64, and one fused call executes them. The rows of a whole run are made and
uploaded together, when the first of them is asked for.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pygen.diffusion.rows import Factors, conversion, written_out
from pygen.ops.affine_step import COLUMNS, affine_results, history_terms, make_table
from pygen.ops.dynamic_threshold import dynamic_threshold

Key = tuple[Hashable, ...]
Columns = dict[str, float]
Level = tuple[float, float]  # alpha, sigma


class Rows(NamedTuple):
    """Rows of a table: float64 (rows, columns), and int64 indices."""

    table: Tensor
    indices: Tensor


def promoted(first: torch.dtype, second: torch.dtype) -> torch.dtype:
    """torch.promote_types, of the floating-point types that affine_step takes, and no call of torch's."""
    return first if first == second else torch.float32


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A host's tensor on a device, which is not waited for."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def tensor_table(columns: dict[str, Any], device: torch.device) -> Rows:
    """A table of columns whose values only the device may know: numbers, or tensors that broadcast to one shape.

    Returns:
        the table, with a row for each element of that shape, and the rows' indices, in that shape.
    """
    values = torch.broadcast_tensors(
        *(
            value.to(device, torch.float64)
            if isinstance(value, Tensor)
            else torch.full((), value, dtype=torch.float64, device=device)
            for value in columns.values()
        )
    )
    rows = torch.arange(values[0].numel(), device=device).view(values[0].shape)
    table = upload(make_table([{}]), device).expand(rows.numel(), -1).clone()
    for name, value in zip(columns, values, strict=True):
        table[:, COLUMNS[name]] = value.reshape(-1)
    return Rows(table, rows)


def refuse_index(timestep: float | Tensor) -> None:
    """Refuse the index of a step in place of its timestep."""
    if isinstance(timestep, (int, torch.IntTensor, torch.LongTensor)):
        raise ValueError(f"timestep must be one of scheduler.timesteps, not the index of a step, got {timestep!r}")


def returned(output: type[OrderedDict[str, Any]], return_dict: bool, **results: Any) -> Any:
    """What a step gives back: one of diffusers' outputs, as its constructor makes it, slowly; or a tuple."""
    if not return_dict:
        return tuple(results.values())
    one: Any = OrderedDict.__new__(output)
    for name, value in results.items():
        if value is not None:
            OrderedDict.__setitem__(one, name, value)
    one.__dict__ = results
    return one


def variance_preserving(squared: float) -> Level:
    """(alpha, sigma) from alpha^2."""
    return squared**0.5, (1.0 - squared) ** 0.5


class HostTensor:
    """A tensor that diffusers' class keeps, of which the host knows the values; assigning it forgets all rows."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, scheduler: Any, owner: type | None = None) -> Any:
        if scheduler is None:
            return self
        try:
            return scheduler.__dict__[self.name]
        except KeyError:
            raise AttributeError(f"{type(scheduler).__name__} has no {self.name} yet") from None

    def __set__(self, scheduler: Any, value: Any) -> None:
        scheduler.__dict__[self.name] = value
        scheduler.__dict__.setdefault("_host_values", {}).pop(self.name, None)
        scheduler.__dict__["_tables"] = {}
        if isinstance(value, Tensor) and value.device.type != "cpu":
            scheduler._host(self.name)  # now, so that no step waits for the device


class FusedScheduler:
    """Mixed into every drop-in, before diffusers' class."""

    timesteps = HostTensor()
    config: Any
    num_inference_steps: int | None
    _host_values: dict[str, list[float]]
    _tables: dict[tuple[Key, torch.device], Rows]
    _step_index: int | None

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        scheduler = super().__new__(cls)
        # A pipeline saves the library that this names; with diffusers' own, its files load without pygen.
        bases = (base.__module__ for base in cls.__mro__)
        scheduler.__dict__["__module__"] = next(name for name in bases if name.startswith("diffusers."))
        return scheduler

    # What the host knows of the schedule.

    def _host(self, name: str) -> list[Any]:
        """The values of a ``HostTensor``."""
        values = self._host_values.get(name)
        if values is None:
            values = self._host_values[name] = getattr(self, name).tolist()
        return values

    def _place(self, tensor: Tensor, name: str) -> int | None:
        """Of which element of a ``HostTensor`` this is a view."""
        held = self.__dict__.get(name)
        if isinstance(held, Tensor) and tensor.dtype == held.dtype and held.is_contiguous():
            offset = tensor.data_ptr() - held.data_ptr()
            if 0 <= offset < held.nbytes:
                return offset // held.element_size()
        return None

    def _time(self, timestep: Any) -> Any:
        """A timestep as a number, which takes no waiting for a device where it is a view into ``timesteps``."""
        if not isinstance(timestep, Tensor):
            return timestep
        place = self._place(timestep, "timesteps")
        return timestep.item() if place is None else self._host("timesteps")[place]

    def index_for_timestep(self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """The index of a timestep in the schedule: the second where there are several, as for image to image."""
        times = self._host("timesteps") if schedule_timesteps is None else schedule_timesteps.tolist()
        time = self._time(timestep)
        found = [i for i, other in enumerate(times) if other == time]
        return found[min(1, len(found) - 1)] if found else self._index_of_unknown(time, times)

    def _index_of_unknown(self, time: float, times: list[float]) -> int:
        raise ValueError(f"timestep must be one of scheduler.timesteps, got {time}")

    def _init_step_index(self, timestep: float | Tensor) -> None:
        begin = getattr(self, "begin_index", None)
        self._step_index = self.index_for_timestep(timestep) if begin is None else begin

    def _index(self, timestep: float | Tensor) -> int:
        """The index of the present step; the first one is found by its timestep."""
        if self._step_index is None:
            self._init_step_index(timestep)
        assert self._step_index is not None
        return self._step_index

    # Rows.

    def _row(self, *key: Any, **named: Any) -> Columns:
        """The columns, by name, of the step that a key names."""
        raise NotImplementedError

    def _run(self, *key: Any, **named: Any) -> Iterable[Key]:
        """The keys that a run is likely to visit from this one on; their rows are made together."""
        return ()

    def _finite(self, key: Key) -> Columns | None:
        """The row of a key, if all of its coefficients are numbers; without the prediction where nothing clamps it."""
        try:
            with np.errstate(divide="ignore", invalid="ignore"):
                row = self._row(*key)
                if "pred_x" in row and "low" not in row:
                    row = written_out(row)
        except ZeroDivisionError:
            return None
        return row if all(math.isfinite(row[name]) for name in row.keys() - {"low", "high"}) else None

    def _find(self, key: Key, device: torch.device) -> Rows:
        """A table with a key's row, and the index of the row, on a device."""
        found = self._tables.get((key, device))
        if found is None:
            rows = {one: self._finite(one) for one in dict.fromkeys((key, *self._run(*key)))}
            if rows[key] is None:
                raise ValueError(
                    f"{type(self).__name__} has no finite coefficients for step {key} with prediction_type "
                    f"{self.config.get('prediction_type')!r} on this schedule"
                )
            by_terms: dict[int, dict[Key, Columns]] = {}
            for one, row in rows.items():
                if row is not None:
                    by_terms.setdefault(history_terms(row), {})[one] = row
            for terms, alike in by_terms.items():
                table = upload(make_table(list(alike.values()), terms), device)
                for one, index in zip(alike, torch.arange(len(alike), device=device).unbind(), strict=True):
                    self._tables[one, device] = Rows(table, index)
            found = self._tables[key, device]
        return found

    def _fused(
        self,
        row: Key | Rows,
        x: Tensor,
        model_output: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
        noise: dict[str, Tensor] | None = None,
        threshold: bool = False,
        **how: Any,
    ) -> tuple[Tensor, Any, Any]:
        """Execute the row of a key, or rows of a table; ``how`` are affine_step's operands, and the dtypes of ``pred``
        and ``second``.

        Returns:
            the next sample, and the prediction and the second result where a dtype is given for them; new tensors,
            which the caller may keep.
        """
        table, rows = row if isinstance(row, Rows) else self._find(row, x.device)
        if threshold:
            how["scale"] = dynamic_threshold(
                x, model_output, table, rows,
                ratio=self.config.dynamic_thresholding_ratio, max_value=self.config.sample_max_value,
            )  # fmt: skip
        if noise is not None:
            how |= noise
        return affine_results(x, model_output, table, rows, out=dtype, **how)

    def _noised(self, x: Tensor, noise: Tensor, levels: Sequence[Level]) -> Tensor:
        """alpha x + sigma noise, each sample at its own of ``levels`` (alpha, sigma), or all at the one given."""
        if len(levels) not in (1, len(x)):
            raise ValueError(f"timesteps must be one, or one per sample ({len(x)}), got {len(levels)}")
        alpha, sigma = upload(torch.tensor(levels, dtype=torch.float64), x.device).unbind(1)
        return self._mixed(x, noise, alpha, sigma)

    def _mixed(self, x: Tensor, noise: Tensor, alpha: Any, sigma: Any) -> Tensor:
        """alpha x + sigma noise; numbers, or tensors of one number, one per sample or one per (sample, token)."""
        table, rows = tensor_table({"x0": alpha, "noise0": sigma}, x.device)
        if rows.numel() > 1:
            rows = rows.expand(x.shape[: rows.dim()])
        return self._fused(Rows(table, rows), x, noise={"noise": noise}, dtype=torch.result_type(x, noise))[0]


class OfTimestep(FusedScheduler):
    """Schedulers whose steps are keyed by the timestep, an index into ``alphas_cumprod``."""

    alphas_cumprod = HostTensor()

    def _level(self, timestep: int) -> Level:
        """(alpha, sigma) at a training timestep."""
        squared = self._host("alphas_cumprod")
        if not -len(squared) <= timestep < len(squared):
            raise IndexError(f"timestep must be less than num_train_timesteps={len(squared)}, got {timestep}")
        return variance_preserving(squared[timestep])

    def _level_before(self, timestep: int) -> Level:
        """(alpha, sigma) where a step leads: before the first training timestep, to the scheduler's end."""
        if timestep >= 0:
            return self._level(timestep)
        return variance_preserving(float(getattr(self, "final_alpha_cumprod", 1.0)))

    @property
    def _thresholds(self) -> bool:
        return self.config.get("thresholding", False)

    def _conversion(self, level: Level) -> tuple[Factors, Factors]:
        """x_0 and epsilon from the sample and the model's output."""
        alpha, sigma = level
        if alpha == 0.0 and self._clip():
            alpha = 1e-30  # epsilon tells x_0 no more than a sign, of which the clamp makes the whole range
        prediction = self.config.get("prediction_type", "epsilon")
        if prediction not in ("epsilon", "sample", "v_prediction"):
            raise ValueError(f"prediction_type must be epsilon, sample or v_prediction, got {prediction!r}")
        return conversion(prediction, alpha, sigma)

    def _clip(self) -> Columns:
        """The clamp of the predicted x_0: to [-1, 1] times the threshold, where one is made on the device."""
        if self._thresholds:
            return {"low": -1.0, "high": 1.0}
        if self.config.get("clip_sample", False):
            reach = self.config.get("clip_sample_range", 1.0)
            return {"low": -reach, "high": reach}
        return {}

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha_t x_0 + sigma_t noise, each sample at its own timestep."""
        return self._noised(original_samples, noise, [self._level(t) for t in timesteps.reshape(-1).tolist()])

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The target of v-prediction, alpha_t noise - sigma_t x_0 (Salimans & Ho 2022)."""
        levels = (self._level(t) for t in timesteps.reshape(-1).tolist())
        return self._noised(sample, noise, [(-sigma, alpha) for alpha, sigma in levels])


class OnSigmas(FusedScheduler):
    """Schedulers that walk a grid of sigmas."""

    sigmas = HostTensor()
    begin_index: int | None
    step_index: int | None

    def _level(self, index: int) -> Level:
        """(alpha, sigma) at an index."""
        return 1.0, self._host("sigmas")[index]

    def _interval(self, index: int) -> tuple[float, float]:
        """The sigmas between which a step leads."""
        sigmas = self._host("sigmas")
        if index + 1 >= len(sigmas):
            raise ValueError(
                f"step {index} is past the last of sigmas; where two timesteps are one, the run must be begun by "
                "set_begin_index"
            )
        return sigmas[index], sigmas[index + 1]

    def _levels(self, timesteps: Tensor) -> list[Level]:
        """Those of timesteps, or the one of the scheduler's present or first step if it has one."""
        if self.begin_index is None:
            return [self._level(self.index_for_timestep(t)) for t in timesteps.reshape(-1)]
        return [self._level(self.begin_index if self.step_index is None else self.step_index)]


class OfIndex(OnSigmas):
    """Those of them whose samples are noised by ``add_noise``."""

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x_0 + sigma noise, at the scheduler's present or first step if it has one, else by timestep."""
        return self._noised(original_samples, noise, self._levels(timesteps))
