"""`/` and `/playground/...`: the files of the playground, to browsers; and Markdown as the page shows it."""

from collections.abc import Awaitable, Callable, Mapping

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException

from server.api.json_body import JsonRoute, ServiceDependency
from server.playground import MARKDOWN_PATH, SECURITY_HEADERS, Asset
from server.protocol.playground import MarkdownRequest

READ = ["GET", "HEAD"]


def playground_router(assets: Mapping[str, Asset]) -> APIRouter:
    """Routes of these files, by path."""
    router = APIRouter(route_class=JsonRoute, include_in_schema=False)
    for path, asset in assets.items():
        router.add_api_route(path, _answering(asset, is_page=path == "/"), methods=READ, response_class=Response)
    if assets:
        router.add_api_route(MARKDOWN_PATH, _render, methods=["POST"], response_class=Response)
    return router


async def _render(body: MarkdownRequest, service: ServiceDependency) -> Response:
    return Response(await service.renderer.render(body.text), media_type="application/json")


def _answering(asset: Asset, *, is_page: bool) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        if is_page and not _wants_page(request.headers.get("accept", "")):
            raise HTTPException(404)  # programs that look for an API here are told as ever
        headers = {**SECURITY_HEADERS, "cache-control": "no-cache", "etag": asset.etag}
        if is_page:
            headers["vary"] = "accept"
        if _is_known(asset.etag, request.headers.get("if-none-match", "")):
            return Response(status_code=304, headers=headers)
        return Response(asset.content, headers={**headers, "content-type": asset.media_type})

    return answer


def _wants_page(accept: str) -> bool:
    """Whether a browser asks, or anything that takes what it gets."""
    kinds = {part.partition(";")[0].strip().lower() for part in accept.split(",")}
    return bool(kinds & {"", "text/html", "text/*", "*/*"}) and not (
        "application/json" in kinds and "text/html" not in kinds
    )


def _is_known(etag: str, if_none_match: str) -> bool:
    return etag in {part.strip().removeprefix("W/") for part in if_none_match.split(",")}
