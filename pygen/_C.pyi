AFFINE_COLUMNS: list[str]
LOSS_COLUMNS: list[str]
MAX_HISTORY: int
DRAW_AFFINE_STEP: int
DRAW_TOKEN: int
DRAW_UNMASK: int
DRAW_POSTERIOR: int
DRAW_ROUTE: int
DRAW_WATERMARK: int
DRAW_VERIFY: int
DRAW_SAMPLE: int
CUDA_BUILT: bool

def isa() -> str: ...
def set_isa(name: str) -> None: ...
def supported_isas() -> list[str]: ...
def compiled_isas() -> list[str]: ...
