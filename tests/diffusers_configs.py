"""What may be asked of each of diffusers' schedulers: its knobs, from which legal configurations are drawn."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Options = dict[str, Any]
Choices = list[Options]  # of which one is taken; the first is the default


@dataclass(frozen=True)
class Configuration:
    name: str  # of the class
    number: int
    steps: int
    config: Options = field(default_factory=dict)  # for the constructor
    prepare: Options = field(default_factory=dict)  # for set_timesteps, beside the number of steps
    step: Options = field(default_factory=dict)  # for step

    def get(self, option: str, default: Any = None) -> Any:
        return {**self.config, **self.prepare, **self.step}.get(option, default)

    def __str__(self) -> str:
        options = {**self.config, **self.prepare, **self.step}
        short = {key: "..." if isinstance(value, list | np.ndarray) else value for key, value in options.items()}
        return f"{self.name}({', '.join(f'{key}={value}' for key, value in short.items())}), {self.steps} steps"


def always(_: Configuration) -> bool:
    return True


@dataclass(frozen=True)
class Space:
    config: Sequence[Choices] = ()
    prepare: Sequence[Choices] = ()
    step: Sequence[Choices] = ()
    steps: Sequence[int] = (10, 5, 2, 17)
    legal: Callable[[Configuration], bool] = always
    count: int = 10


def one(option: str, *values: Any) -> Choices:
    """The default, or one of these values."""
    return [{}, *({option: value} for value in values)]


TRAINED = [round(1e-4 + 0.03 * (i / 199) ** 2, 6) for i in range(200)]
BETAS = [
    {},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_start": 0.002, "beta_end": 0.01, "num_train_timesteps": 400},
    {"trained_betas": TRAINED, "num_train_timesteps": 200},
]
DDPM_BETAS = [*BETAS, {"beta_schedule": "sigmoid"}]
SPACING = [
    {},
    {"timestep_spacing": "linspace"},
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "trailing"},
]
PREDICTION = one("prediction_type", "sample", "v_prediction")
CLIP = [{}, {"clip_sample": False}, {"clip_sample": True, "clip_sample_range": 0.7}]
THRESHOLD = [
    {},
    {"thresholding": True},
    {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.5},
]
SIGMAS = [{}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}]
FLOW = [{}, {}, {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}]
ZERO_SNR = one("rescale_betas_zero_snr", True)
FINAL = one("final_sigmas_type", "sigma_min")
LOWER = one("lower_order_final", True, False)
DICT = [{}, {}, {"return_dict": False}]
CHURN = [{}, {"s_churn": 2.0, "s_noise": 1.003}, {"s_churn": 40.0, "s_tmin": 0.05, "s_tmax": 50.0}]
FLOW_SHIFT = [
    {},
    {"shift": 3.0},
    {"shift": 3.0, "shift_terminal": 0.1},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True, "shift": 3.0},
]
EDM = [
    one("sigma_schedule", "exponential"),
    one("prediction_type", "v_prediction"),
    one("final_sigmas_type", "sigma_min"),
    [{}, {"sigma_min": 0.03, "sigma_max": 20.0, "sigma_data": 1.0}],
    one("rho", 5.0),
]
DDIM = Space(
    [BETAS, PREDICTION, CLIP, THRESHOLD, SPACING, ZERO_SNR, one("set_alpha_to_one", False)],
    step=[one("eta", 0.5, 1.0), one("use_clipped_model_output", True), DICT],
    count=20,
)
DDPM = Space(
    [
        DDPM_BETAS,
        PREDICTION,
        CLIP,
        THRESHOLD,
        SPACING,
        ZERO_SNR,
        one("variance_type", "fixed_small_log", "fixed_large", "learned", "learned_range"),
    ],
    [[{}, {}, {"timesteps": [180, 120, 70, 30, 4]}]],
    [DICT],
    count=20,
)
COGVIDEO = Space(
    [
        [{}, {"beta_schedule": "linear"}, {"beta_schedule": "squaredcos_cap_v2"}],
        PREDICTION,
        SPACING,
        ZERO_SNR,
        one("set_alpha_to_one", False),
        one("snr_shift_scale", 1.0),
    ],
    step=[DICT],
)
LCM = Space(
    [BETAS, PREDICTION, CLIP, THRESHOLD, ZERO_SNR, one("set_alpha_to_one", False), one("timestep_scaling", 3.0)],
    [one("original_inference_steps", 25), one("strength", 0.8)],
    [DICT],
    steps=(4, 2, 1, 8),
)
NOISE_PREDICTION = one("prediction_type", "v_prediction")
K_DIFFUSION = [BETAS, NOISE_PREDICTION, SPACING, SIGMAS]
DPM_SOLVER = [
    BETAS,
    PREDICTION,
    FLOW,
    SIGMAS,
    SPACING,
    THRESHOLD,
    one("solver_order", 1, 3),
    one("solver_type", "heun"),
    LOWER,
]
DYNAMIC = [{}, {}, {"use_dynamic_shifting": True, "use_flow_sigmas": True, "prediction_type": "flow_prediction"}]


def one_kind_of_sigmas(c: Configuration) -> bool:
    """Flow sigmas are of flow predictions; and the kinds of sigmas exclude each other."""
    kinds = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas")
    flow = c.get("prediction_type") == "flow_prediction"
    return sum(c.get(kind, False) for kind in kinds) <= 1 and flow == c.get("use_flow_sigmas", False)


def own_times(c: Configuration) -> bool:
    """Timesteps of one's own are of no other kind of sigmas."""
    kinds = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
    given = c.get("timesteps") is not None or c.get("sigmas") is not None
    return not (given and any(c.get(kind) for kind in kinds))


def dynamic_shifting(c: Configuration) -> bool:
    return (c.get("mu") is not None) == c.get("use_dynamic_shifting", False)


def dpm_solver(c: Configuration) -> bool:
    """dpmsolver is of noise: it cannot step to sigma = 0, threshold, or take flow predictions."""
    noise = c.get("algorithm_type") in ("dpmsolver", "sde-dpmsolver")
    if noise and (c.get("final_sigmas_type") != "sigma_min" or c.get("thresholding") or c.get("use_flow_sigmas")):
        return False
    return one_kind_of_sigmas(c) and dynamic_shifting(c)


def flow_match(c: Configuration) -> bool:
    shifted = c.get("shift", 1.0) != 1.0
    return dynamic_shifting(c) and not (c.get("use_dynamic_shifting") and shifted)


FLOW_MATCH = [
    FLOW_SHIFT,
    one("invert_sigmas", True),
    one("use_dynamic_shifting", True),
    one("time_shift_type", "linear"),
]
MU = one("mu", 0.8)
HELIOS = [
    [{}, {"stages": 1, "stage_range": [0, 1]}, {"stages": 1, "stage_range": [0, 1], "shift": 3.0}, {"shift": 3.0}],
    one("gamma", 0.5),
    one("use_dynamic_shifting", True),
]
TOKEN_STEP = [one("temperature", 0.7, 1.0)]

SPACES: dict[str, Space] = {
    "AmusedScheduler": Space(
        [[{"mask_token_id": 12}], one("masking_schedule", "linear")],
        [one("temperature", 1, (3, 1))],
        [DICT, one("starting_mask_ratio", 0.8)],
    ),
    "BlockRefinementScheduler": Space(
        [one("block_length", 24), one("threshold", 0.3), one("editing_threshold", 0.2), one("minimal_topk", 2)],
        step=[
            *TOKEN_STEP,
            one("mask_token_id", 12),
            one("top_p", 0.8),
            one("top_k", 5),
            one("sampling_method", "greedy", "multinomial"),
            DICT,
        ],
        count=14,
    ),
    "CMStochasticIterativeScheduler": Space(
        [
            one("clip_denoised", False),
            [{}, {"sigma_min": 0.02, "sigma_max": 20.0}],
            one("s_noise", 1.1),
            one("rho", 5.0),
        ],
        [[{}, {"timesteps": [39, 22, 0]}]],
        [DICT],
    ),
    "CogVideoXDDIMScheduler": Space(
        [*COGVIDEO.config], step=[one("eta", 0.5), one("use_clipped_model_output", True), DICT]
    ),
    "CogVideoXDPMScheduler": COGVIDEO,
    "CosineDPMSolverMultistepScheduler": Space(
        [
            one("sigma_schedule", "karras"),
            one("prediction_type", "epsilon"),
            one("solver_order", 1),
            one("solver_type", "heun"),
            LOWER,
            one("euler_at_final", True),
            FINAL,
            [{}, {"sigma_min": 0.05, "sigma_max": 80.0, "sigma_data": 0.5}],
        ],
        step=[DICT],
    ),
    "DDIMInverseScheduler": Space(
        [BETAS, PREDICTION, CLIP, one("timestep_spacing", "trailing"), ZERO_SNR, one("set_alpha_to_one", False)],
        step=[DICT],
    ),
    "DDIMParallelScheduler": DDIM,
    "DDIMScheduler": DDIM,
    "DDPMParallelScheduler": DDPM,
    "DDPMScheduler": DDPM,
    "DDPMWuerstchenScheduler": Space([one("scaler", 0.5, 2.0), one("s", 0.02)], step=[DICT]),
    "DEISMultistepScheduler": Space(
        [
            BETAS,
            PREDICTION,
            FLOW,
            SIGMAS,
            SPACING,
            THRESHOLD,
            one("solver_order", 1, 3),
            LOWER,
            DYNAMIC,
        ],
        [MU],
        [DICT],
        legal=dpm_solver,
        count=14,
    ),
    "DPMSolverMultistepInverseScheduler": Space(
        [
            *DPM_SOLVER,
            one("algorithm_type", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver"),
            one("euler_at_final", True),
            one("lambda_min_clipped", -5.1),
            one("variance_type", "learned_range"),
        ],
        step=[DICT],
        legal=lambda c: one_kind_of_sigmas(c) and dpm_solver(_with_final(c)),
        count=20,
    ),
    "DPMSolverMultistepScheduler": Space(
        [
            *DPM_SOLVER,
            [
                {},
                {"algorithm_type": "sde-dpmsolver++"},
                {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
                {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"},
                {"final_sigmas_type": "sigma_min"},
            ],
            one("euler_at_final", True),
            one("use_lu_lambdas", True),
            one("lambda_min_clipped", -5.1),
            one("variance_type", "learned_range"),
            ZERO_SNR,
            DYNAMIC,
        ],
        [MU, [{}, {}, {"timesteps": [180, 120, 70, 30, 4]}]],
        [DICT],
        legal=lambda c: dpm_solver(c) and own_times(c),
        count=30,
    ),
    "DPMSolverSDEScheduler": Space(
        [[{"noise_sampler_seed": 7}], *K_DIFFUSION], step=[one("s_noise", 1.1), DICT], steps=(5, 2, 9)
    ),
    "DPMSolverSinglestepScheduler": Space(
        [
            *(choices for choices in DPM_SOLVER if choices is not SPACING),
            [
                {},
                {"algorithm_type": "sde-dpmsolver++"},
                {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
                {"final_sigmas_type": "sigma_min"},
            ],
            one("lambda_min_clipped", -5.1),
            one("variance_type", "learned_range"),
            DYNAMIC,
        ],
        [MU, [{}, {}, {"timesteps": [180, 120, 70, 30, 4]}]],
        [DICT],
        legal=lambda c: dpm_solver(c) and own_times(c),
        count=24,
    ),
    "DiscreteDDIMScheduler": Space(
        [
            [{}, {"corrector_steps": 2, "corrector_k": 3}],
            one("corrector_selection", "lowest_maxprob", "lowest_current_prob", "random"),
            one("corrector_selection_tau", 0.5),
        ],
        step=[*TOKEN_STEP, DICT],
    ),
    "EDMDPMSolverMultistepScheduler": Space(
        [
            *EDM,
            THRESHOLD,
            one("solver_order", 1, 3),
            one("solver_type", "heun"),
            one("algorithm_type", "sde-dpmsolver++"),
            LOWER,
            one("euler_at_final", True),
        ],
        step=[DICT],
        count=14,
    ),
    "EDMEulerScheduler": Space(EDM, step=[CHURN, DICT]),
    "EntropyBoundScheduler": Space(
        [one("entropy_bound", 5.0, 20.0), [{}, {"t_max": 1.2, "t_min": 0.1}]], step=[one("entropy_bound", 9.0), DICT]
    ),
    "EulerAncestralDiscreteScheduler": Space([BETAS, NOISE_PREDICTION, SPACING, ZERO_SNR], step=[DICT]),
    "EulerDiscreteScheduler": Space(
        [
            BETAS,
            PREDICTION,
            SPACING,
            SIGMAS,
            ZERO_SNR,
            FINAL,
            one("interpolation_type", "log_linear"),
            one("timestep_type", "continuous"),
            [{}, {"sigma_min": 0.1, "sigma_max": 12.0}],
        ],
        [[{}, {}, {"timesteps": [180, 120, 70, 30, 4]}, {"sigmas": [9.0, 3.0, 1.0, 0.2, 0.0]}]],
        [CHURN, DICT],
        legal=own_times,
        count=20,
    ),
    "FlowMapEulerDiscreteScheduler": Space([one("shift", 3.0), one("num_train_timesteps", 500)], step=[DICT]),
    "FlowMatchEulerDiscreteScheduler": Space(
        [*FLOW_MATCH, one("stochastic_sampling", True)],
        [MU, [{}, {}, {"sigmas": [1.0, 0.7, 0.4, 0.1]}]],
        [DICT],
        legal=flow_match,
        count=20,
    ),
    "FlowMatchHeunDiscreteScheduler": Space([one("shift", 3.0)], step=[CHURN, DICT]),
    "FlowMatchLCMScheduler": Space(
        [*FLOW_MATCH, [{}, {"scale_factors": [1.0, 1.5, 2.0], "upscale_mode": "bilinear"}]],
        [MU],
        [DICT],
        steps=(4,),
        legal=flow_match,
        count=14,
    ),
    "HeliosDMDScheduler": Space(
        [*HELIOS, one("time_shift_type", "exponential")],
        [MU, one("is_amplify_first_chunk", True)],
        [DICT],
        steps=(4, 2),
        legal=flow_match,
    ),
    "HeliosScheduler": Space(
        [
            *HELIOS,
            one("time_shift_type", "linear"),
            one("scheduler_type", "euler"),
            one("solver_order", 1, 3),
            [{}, {"predict_x0": False, "prediction_type": "epsilon"}, {"prediction_type": "v_prediction"}],
            one("solver_type", "bh1"),
            one("lower_order_final", False),
            one("disable_corrector", [0, 1]),
        ],
        [MU],
        [DICT],
        steps=(6, 3),
        legal=flow_match,
        count=14,
    ),
    "HeunDiscreteScheduler": Space(
        [BETAS, PREDICTION, SPACING, SIGMAS, CLIP],
        [[{}, {}, {"timesteps": [180, 120, 70, 30, 4]}]],
        [DICT],
        legal=own_times,
    ),
    "IPNDMScheduler": Space([one("num_train_timesteps", 400)], step=[DICT]),
    "KDPM2AncestralDiscreteScheduler": Space(K_DIFFUSION, step=[DICT], count=8),
    "KDPM2DiscreteScheduler": Space(K_DIFFUSION, step=[DICT], count=8),
    "KarrasVeScheduler": Space(
        [
            [{}, {"sigma_min": 0.1, "sigma_max": 20.0}],
            one("s_churn", 0.0, 5.0),
            one("s_noise", 1.0),
            one("s_max", 10.0),
        ],
        step=[DICT],
    ),
    "LCMScheduler": LCM,
    "LMSDiscreteScheduler": Space(K_DIFFUSION, step=[one("order", 1, 2, 3), DICT]),
    "LTXEulerAncestralRFScheduler": Space(
        [one("eta", 0.0, 0.5), one("s_noise", 0.0, 0.9)], [[{}, {"sigmas": [1.0, 0.7, 0.4, 0.1, 0.0]}]], [DICT]
    ),
    "MiniMaxH3Scheduler": Space([one("shift", 1.0, 3.0)], [[{}, {"sigmas": [1.0, 0.7, 0.4, 0.1, 0.0]}]], [DICT]),
    "PNDMScheduler": Space(
        [
            BETAS,
            one("prediction_type", "v_prediction"),
            SPACING,
            one("skip_prk_steps", True),
            one("set_alpha_to_one", True),
        ],
        step=[DICT],
        steps=(10, 5, 17),
    ),
    "PiflowScheduler": Space(
        [
            [{"num_policy_substeps": 8}, {}],
            one("shift", 1.0, 3.0),
            one("n_grid", 4),
            one("final_step_size_scale", 1.0),
        ],
        step=[DICT],
        steps=(4, 2, 1),
    ),
    "RFD4ProteinaScheduler": Space(
        [
            [{"schedule_mode": mode, "noise_mode": noise} for mode in ("log", "power") for noise in ("1/t", "tan")],
            [{"tsr_k": 1.0, "tsr_sigma": 1.0}, {"tsr_k": 2.0, "tsr_sigma": 1.5}],
            [{"tail_steps": 2}, {"tail_steps": 0}],
            one("t_lim_ode", 0.8),
        ],
        [one("start_time", 0.3)],
        [DICT],
        steps=(10, 17),
    ),
    "RePaintScheduler": Space(
        [DDPM_BETAS[:3], one("eta", 0.5, 1.0), one("clip_sample", False)],
        [[{"jump_length": 2, "jump_n_sample": 2}, {"jump_length": 3, "jump_n_sample": 3}]],
        [DICT],
    ),
    "SASolverScheduler": Space(
        [
            BETAS,
            PREDICTION,
            FLOW,
            SIGMAS,
            SPACING,
            THRESHOLD,
            one("predictor_order", 1, 3),
            one("corrector_order", 1, 3),
            one("algorithm_type", "noise_prediction"),
            LOWER,
            one("variance_type", "learned_range"),
        ],
        step=[DICT],
        legal=lambda c: (
            one_kind_of_sigmas(c)
            and not (
                c.get("algorithm_type") == "noise_prediction" and (c.get("thresholding") or c.get("use_flow_sigmas"))
            )
        ),
        count=20,
    ),
    "SCMScheduler": Space(
        [one("sigma_data", 1.0)],
        [
            [
                {"intermediate_timesteps": None},
                {"intermediate_timesteps": None, "max_timesteps": 1.3},
                {"intermediate_timesteps": 1.1},
            ]
        ],
        [DICT],
        steps=(4, 2, 1, 2),
        legal=lambda c: c.get("intermediate_timesteps") is None or c.steps == 2,
    ),
    "ScoreSdeVeScheduler": Space(
        [one("snr", 0.3), [{}, {"sigma_min": 0.1, "sigma_max": 50.0}], one("correct_steps", 2)], step=[DICT]
    ),
    "TCDScheduler": Space([*LCM.config], LCM.prepare, [one("eta", 0.0, 0.7, 1.0), DICT], steps=LCM.steps, count=14),
    "UnCLIPScheduler": Space(
        [
            one("num_train_timesteps", 400),
            one("prediction_type", "sample"),
            CLIP,
            one("variance_type", "learned_range"),
        ],
        step=[DICT],
    ),
    "UniPCMultistepScheduler": Space(
        [
            BETAS,
            PREDICTION,
            FLOW,
            SIGMAS,
            SPACING,
            THRESHOLD,
            ZERO_SNR,
            FINAL,
            LOWER,
            one("solver_order", 1, 3),
            one("predict_x0", False),
            one("solver_type", "bh1"),
            one("disable_corrector", [0, 2]),
            DYNAMIC,
            [{}, {}, {"shift_terminal": 0.1, "use_flow_sigmas": True, "prediction_type": "flow_prediction"}],
        ],
        [MU, [{}, {}, {"sigmas": np.array([1.0, 0.7, 0.4, 0.1])}]],
        [DICT],
        legal=lambda c: (
            one_kind_of_sigmas(c)
            and dynamic_shifting(c)
            and (c.get("use_flow_sigmas", False) or c.get("sigmas") is None)
            and not (c.get("predict_x0") is False and (c.get("thresholding") or c.get("use_flow_sigmas")))
        ),
        count=30,
    ),
    "VQDiffusionScheduler": Space([[{"num_vec_classes": 13}], one("num_train_timesteps", 40)], step=[DICT]),
}


def _with_final(c: Configuration) -> Configuration:
    """The inverse solvers end at the noise, never at sigma = 0."""
    return Configuration(c.name, c.number, c.steps, {**c.config, "final_sigmas_type": "sigma_min"}, c.prepare, c.step)


def draw(name: str) -> Iterator[Configuration]:
    """Different legal configurations of a class, the default one first."""
    space = SPACES[name]
    random_ = random.Random(name)

    def taken(choices: Sequence[Choices], first: bool) -> Options:
        options: Options = {}
        for choice in choices:
            options |= choice[0] if first or random_.random() < 0.4 else random_.choice(choice)
        return options

    seen: set[str] = set()
    number = 0
    for attempt in range(100 * space.count):
        parts = [taken(part, attempt == 0) for part in (space.config, space.prepare, space.step)]
        configuration = Configuration(name, number, space.steps[attempt % len(space.steps)], *parts)
        key = json.dumps([configuration.steps, *parts], sort_keys=True, default=list)
        if key in seen or not space.legal(configuration):
            continue
        seen.add(key)
        yield configuration
        number += 1
        if number == space.count:
            return
