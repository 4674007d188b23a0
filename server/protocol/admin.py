"""`/admin/`: for operators, with keys of their own."""

from typing import Literal

from pydantic import Field

from server.protocol.wire import RequestModel, ResponseModel

MAX_SELF_CHECK_TOKENS = 4096


class AdminStatus(ResponseModel):
    """How the server is, after what was asked."""

    status: str
    """`ok`, `draining`, or the engine's word: `loading`, `restarting`, `failed`, `stopped`."""
    active: int
    """Requests that generate right now."""
    engine_restarts: int
    """How often the engine process was started again after it had died."""


class DrainRequest(RequestModel):
    """How to drain."""

    wait_s: float = Field(0.0, ge=0, le=86400)
    """Answer when nothing runs any more, after so many seconds at the latest; 0: at once."""
    hand_over: bool = False
    """Then cut off what still runs and save its states, as at a stop: each client gets the id of a state to resume from
    at any server of the same store, and responses in the background are resumed by the others."""


class ReloadRequest(RequestModel):
    """How to load the model again."""

    timeout_s: float = Field(30.0, ge=0, le=86400)
    """How long running answers may take, once the new model is loaded, before they are ended with an error."""
    beside: bool = True
    """Load the model beside the one that serves, which keeps serving if it cannot be loaded. false, for want of memory
    for two: the old one is ended first, and a model that cannot be loaded then ends the server, as at its start."""


class SelfCheckRequest(RequestModel):
    """How thorough a self-check is."""

    num_prompt_tokens: int = Field(192, ge=16, le=MAX_SELF_CHECK_TOKENS)
    """Length of the prompt that everything is tried on."""
    num_generated_tokens: int = Field(48, ge=8, le=MAX_SELF_CHECK_TOKENS)
    """Tokens that are decoded after it."""
    tolerance: float = Field(0.01, ge=0, le=100)
    """Largest difference of log-probabilities that still passes."""


class SelfCheckFinding(ResponseModel):
    """One way to compute the same tokens, compared with reading them at once."""

    name: str
    """Which way."""
    num_values: int
    """Log-probabilities compared; 0: this server cannot do it so (the prefix cache is off, say)."""
    largest_difference: float
    """The largest difference among them."""


class SelfCheckReport(ResponseModel):
    """Whether answers depend on how they are computed."""

    object: Literal["selfcheck"]
    """Kind of this object."""
    model: str
    """Name of the model."""
    passed: bool
    """Whether no difference is larger than the tolerance."""
    tolerance: float
    """As asked for."""
    largest_difference: float
    """Of all comparisons."""
    num_tokens: int
    """Length of the text that was read and decoded."""
    duration_s: float
    """How long it took."""
    findings: list[SelfCheckFinding]
    """The comparisons."""
