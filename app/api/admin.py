"""What an operator asks for, behind the admin key."""

from collections.abc import Mapping

from fastapi import APIRouter
from pydantic import BaseModel, Field
from starlette.requests import Request

from app.api.responses import ANYWHERE, ErrorBody, errors
from app.serving import Serving


class Reloaded(BaseModel):
    """The checkpoint that is served from now on."""

    model_id: str
    model_sha: str = Field(description="SHA-256 of the weights")
    former_sha: str = Field(description="that of the checkpoint before it")
    kind: str
    dimension: int
    seconds: float


_SAID: Mapping[int | str, str] = {
    404: "no admin key is set",
    409: "a reload is under way",
    424: "the checkpoint can't be served; the one before it goes on",
}

router = APIRouter(tags=["admin"], responses=errors(ErrorBody, ANYWHERE, [422], _SAID, changed=_SAID))


@router.post("/admin/reload")
async def reload(request: Request) -> Reloaded:
    """Load what BERTD_MODEL names now and, if it is sound, serve it in the place of the present model; no request fails."""
    serving: Serving = request.state.serving
    done = await serving.reload()
    return Reloaded(
        model_id=done.service.settings.model,
        model_sha=done.service.facts["sha256"],
        former_sha=done.former,
        kind=done.service.config.kind,
        dimension=done.service.config.dimension,
        seconds=round(done.seconds, 3),
    )
