"""`potstill serve`: a model, an address, and a server around it."""

import ipaddress

import torch

from potstill.config import RecipeError
from potstill.console.printable import say
from potstill.models.language_model import fingerprint
from potstill.models.probe import ready
from potstill.wire import token_in


def serve(
    name: str,
    *,
    host: str,
    port: int,
    dtype: str,
    token_variable: str | None,
    trust_remote_code: bool,
) -> None:
    """Serve a model until a signal ends it. Raises RecipeError for settings that are unsafe, and
    ModelError."""
    try:
        import uvicorn

        from potstill.serving.app import make_app
    except ImportError:
        raise RecipeError(
            "fastapi and uvicorn are not installed; pip install 'potstill[serve]'"
        ) from None
    token = token_in(token_variable)
    if token is None and not _is_this_machine(host):
        raise RecipeError(
            f"--host is {host!r}, which other machines reach, and --token-variable names no token: "
            "anyone could use the model; name one, or listen on 127.0.0.1"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = ready(name, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    model.eval().requires_grad_(False)
    app = make_app(model, fingerprint(model), token)
    say(f"serving {name} ({dtype}, {model.num_weights:,} weights) at http://{host}:{port}")
    uvicorn.run(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=5)


def _is_this_machine(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
