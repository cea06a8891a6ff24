"""What is asked for where, who may ask, and what is refused.

    POST /predict/NAME   one model        GET /models    what is served
    POST /predict        several          GET /health, /ready, /metrics
    GET /                a page to try it GET /docs, /openapi.json

A body is an image as it is (JPEG, PNG, TIFF), or JSON that names or holds images:

    {"image": IMAGE}   {"images": {"rgb": IMAGE, "second": IMAGE}}
    IMAGE: "<base64>"  or  {"path": "scene.tif", "window": {"col", "row", "width", "height"}}
"""

import asyncio
import base64
import binascii
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

import ringmo
from ringmo import console
from ringmo.data.buckets import Bucket
from ringmo.errors import BadInput
from ringmo.inference.server import formats, images
from ringmo.inference.server.batching import Engine
from ringmo.inference.server.images import Picture, Refused
from ringmo.inference.server.measures import Measures
from ringmo.inference.server.models import Loaded, Models, Slot
from ringmo.inference.whole_images import Prepared, at_own_pixels, prepared
from ringmo.monitoring.record import WINDOW

VERSION = "Ringmo-Version"  # header
FREE = {"/", "/docs", "/openapi.json", "/health", "/ready"}  # need no token
LOOPBACK = ("localhost", "127.0.0.1", "::1")
HELD_BYTES = 1e9  # of bodies and pixels, of all requests together
LINGER_BYTES, LINGER_S = 8e6, 2.0  # of a refused body, read so that its sender hears why
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; connect-src 'self'"
)
GONE = 499  # nobody is there to hear the answer

Group = tuple[tuple[Loaded, ...], Prepared]  # models with one encoder, and what they read


@dataclass(frozen=True)
class Limits:
    """requests: within at a time. body: bytes. side: pixels. seconds: each of a
    request's body and its answer."""

    requests: int
    body: int
    side: int
    seconds: float


class SceneOf(BaseModel):
    """A scene below the server's folder or prefix (`--root`); without a window all of it."""

    model_config = ConfigDict(extra="forbid")

    path: str = Field(min_length=1, max_length=4096)
    window: images.Place | None = None


Given = Annotated[str, Field(description="an image file in base64")] | SceneOf


class Asked(BaseModel):
    """`image`, or `images` by what they are of (see GET /models: reads)."""

    model_config = ConfigDict(extra="forbid")

    image: Given | None = None
    images: dict[str, Given] | None = Field(None, min_length=1, max_length=16)

    @model_validator(mode="after")
    def _one(self) -> "Asked":
        if (self.image is None) == (self.images is None):
            raise ValueError("give `image` or `images`")
        return self


class Within:
    """One request that was let in: what it holds in memory, and whether it is still on its way to
    the models."""

    def __init__(self, server: "Server") -> None:
        self.server, self.bytes, self.on_way = server, 0, True
        server.within += 1
        server.measures.within.set(server.within)
        server.engine.expect(1)

    def hold(self, count: int) -> None:
        self.bytes += count
        self.server.held += count
        if self.server.held > HELD_BYTES:
            raise Refused(429, "too many large images at once: try again in a second")

    def arrived(self) -> None:
        """It is a job, or it has come to its end."""
        if self.on_way:
            self.on_way = False
            self.server.engine.expect(-1)

    def leave(self) -> None:
        self.arrived()
        self.server.within -= 1
        self.server.held -= self.bytes
        self.server.measures.within.set(self.server.within)


class Server:
    """What the routes share."""

    def __init__(
        self,
        models: Models,
        engine: Engine,
        measures: Measures,
        limits: Limits,
        root: Path | Bucket | None,
    ) -> None:
        self.models, self.engine, self.measures = models, engine, measures
        self.limits, self.root = limits, root
        self.within, self.held, self.ending = 0, 0, False
        self.cut_off = 0  # requests that were let in and got no answer, since the server ended
        # GDAL and the decoders give way to other threads while they work.
        self.workers = ThreadPoolExecutor(4, "images")

    async def predict(
        self, request: Request, slots: list[Slot], *, several: bool, as_picture: bool
    ) -> Response:
        """Answer one request, whatever comes of it, and count it."""
        label = slots[0].name if len(slots) == 1 else "several"
        started = time.perf_counter()
        if self.within >= self.limits.requests:
            refused = Refused(429, f"{self.within} requests are being answered: try again")
            return await self._refused(request, label, refused)
        within = Within(self)
        try:
            response = await self._answered(request, slots, several, as_picture, within)
        except Refused as error:
            return await self._refused(request, label, error)
        except BadInput as error:
            return await self._refused(request, label, Refused(422, str(error)))
        except ClientDisconnect:
            self.measures.requests.labels(label, GONE).inc()
            return Response(status_code=GONE)
        except asyncio.CancelledError:
            self.cut_off += 1
            raise
        # A fault of ours: whoever asked hears of it, and the next request is answered.
        except Exception as error:
            console.note(f"serve: {label}: {type(error).__name__}: {error}")
            return await self._refused(
                request, label, Refused(500, "the server failed; see its log")
            )
        finally:
            within.leave()
        self.measures.requests.labels(label, response.status_code).inc()
        self.measures.seconds.labels(label).observe(time.perf_counter() - started)
        return response

    async def _answered(
        self,
        request: Request,
        slots: list[Slot],
        several: bool,
        as_picture: bool,
        within: Within,
    ) -> Response:
        form = formats.accepted(request.headers.get("accept"))
        if several and form != formats.JSON:
            raise Refused(406, f"several models answer with {formats.JSON}")
        for slot in slots:
            formats.check(form, slot.loaded)
        # From here on the versions stay the same, whatever the aliases do.
        loaded = [slot.loaded for slot in slots]
        try:
            async with asyncio.timeout(self.limits.seconds):
                body = await self._body(request, within)
        except TimeoutError:
            raise Refused(408, f"no whole body after {self.limits.seconds:g} s") from None
        try:
            async with asyncio.timeout(self.limits.seconds):
                how = (form, several, as_picture)
                return await self._computed(request, loaded, how, body, within)
        except TimeoutError:
            raise Refused(504, f"no answer after {self.limits.seconds:g} s") from None

    async def _body(self, request: Request, within: Within) -> bytes:
        """The body, cut off as soon as it is too large, whether or not it says its length."""
        limit = self.limits.body
        too_large = Refused(413, f"a body of over {limit} bytes (--max-body)")
        if int(request.headers.get("content-length") or 0) > limit:
            raise too_large
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise too_large
            within.hold(len(part))
            parts.append(part)
        return b"".join(parts)

    async def _computed(
        self,
        request: Request,
        loaded: list[Loaded],
        how: tuple[str, bool, bool],
        body: bytes,
        within: Within,
    ) -> Response:
        in_worker = asyncio.get_running_loop().run_in_executor
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        pictures, groups, name = await in_worker(
            self.workers, self._prepared, loaded, body, kind == formats.JSON
        )
        within.hold(sum(picture.pixels.nbytes for picture in pictures.values()))
        jobs = [self.engine.submit(group, image, name) for group, image in groups]
        within.arrived()
        try:
            said = await asyncio.gather(*jobs)
        finally:  # where one failed, or the time is over, the others are for nobody
            for job in jobs:
                job.cancel()
        told: dict[Loaded, Any] = {}
        inputs: dict[Loaded, Prepared] = {}
        for (group, image), answers in zip(groups, said, strict=True):
            told |= dict(zip(group, answers, strict=True))
            inputs |= dict.fromkeys(group, image)
        versions = ", ".join(model.version for model in loaded)
        form, several, as_picture = how
        arguments = (loaded, told, inputs, pictures, *how)
        if form != formats.JSON or loaded[0].task.padded or several or as_picture:
            content = await in_worker(self.workers, _content, *arguments)
        else:
            content = _content(*arguments)
        return Response(content, media_type=form, headers={VERSION: versions})

    def _prepared(
        self, loaded: list[Loaded], body: bytes, is_json: bool
    ) -> tuple[dict[str, Picture], list[Group], str]:
        """The images of a request, what each model reads of them, and what it is known by."""
        given: Mapping[str, bytes | SceneOf]
        given = _given(body) if is_json else {"": body}
        reads = {model: list(model.bundle.reads) for model in loaded}
        known = {
            name: len(sensor.bands)
            for model in loaded
            for name, sensor in model.bundle.reads.items()
        }
        if set(given) == {""}:
            given = {reads[loaded[0]][0]: given[""]}
        for name in given:
            if name not in known:
                raise BadInput(f"`{name[:100]}`: what is read is {', '.join(known)}")
        for model in loaded:
            if missing := [name for name in reads[model] if name not in given]:
                raise BadInput(
                    f"{model.name} reads {' and '.join(reads[model])} of the same ground: "
                    f'{missing[0]} is missing (JSON: {{"images": {{…}}}})'
                )
        pictures = {name: self._read(one, known[name]) for name, one in given.items()}
        pixels = {name: picture.pixels for name, picture in pictures.items()}
        inputs = [
            (model, prepared(model.bundle, model.task, {n: pixels[n] for n in reads[model]}))
            for model in loaded
        ]
        return pictures, _grouped(inputs), self._name(next(iter(given.values())))

    def _name(self, one: bytes | SceneOf) -> str:
        """For the sample of production: the scene and its window, or a name of its own."""
        if isinstance(one, bytes) or self.root is None:
            return uuid.uuid4().hex
        path, window = f"{self.root}/{one.path}", one.window
        if window is None:
            return path
        return f"{path}{WINDOW}{window.col},{window.row},{window.width},{window.height}"

    def _read(self, one: bytes | SceneOf, bands: int) -> Picture:
        if isinstance(one, bytes):
            return images.from_body(one, bands, self.limits.side)
        if self.root is None:
            raise Refused(403, "this server reads no scenes by name: it was started without --root")
        return images.from_scene(self.root, one.path, one.window, bands, self.limits.side)

    async def _refused(self, request: Request, label: str, refused: Refused) -> Response:
        self.measures.requests.labels(label, refused.status).inc()
        whole = await _linger(request)
        return refusal(refused.status, str(refused), close=not whole)


def application(server: Server, token: str | None, host: str) -> Any:
    """The ASGI application."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        server.engine.start()
        yield
        server.ending = True
        server.models.stop()
        await asyncio.to_thread(server.engine.stop)
        await asyncio.to_thread(server.models.close)  # with the rows of the last batches
        server.workers.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(
        title="RingMo",
        version=ringmo.__version__,
        description="Answers of registered models. " + (__doc__ or "").partition("\n\n")[2],
        docs_url=None,  # FastAPI's own pages load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
    )
    slots = server.models.slots
    body = {
        "requestBody": {
            "required": True,
            "content": {
                **{
                    kind: {"schema": {"type": "string", "format": "binary"}}
                    for kind in ("image/jpeg", "image/png", "image/tiff")
                },
                formats.JSON: {"schema": Asked.model_json_schema()},
            },
        }
    }
    answers: dict[int | str, dict[str, Any]] = {
        200: {
            "description": "The answer; its version stands in it and in the header " + VERSION,
            "content": {form: {} for form in formats.FORMS},
        },
        **{
            status: {"description": text}
            for status, text in {
                401: "no token, or another",
                403: "a scene by name, of a server without --root",
                404: "no such model, or no such scene",
                406: "the task's answers have no such form",
                408: "the body did not come in time",
                413: "the body or the image is too large",
                415: "not JPEG, PNG or TIFF",
                421: "asked under another name than localhost, of a server without a token",
                422: "damaged, other bands, no data",
                429: "too many requests; Retry-After says when",
                500: "the server failed; its log says why",
                504: "no answer in time",
            }.items()
        },
    }
    picture = Annotated[bool, Query(description="also the image as people see it, a PNG in base64")]

    @app.post(
        "/predict/{name:path}", openapi_extra=body, responses=answers, summary="Ask one model"
    )
    async def predict_one(name: str, request: Request, picture: picture = False) -> Response:
        if name not in slots:
            return await server._refused(request, "unknown", _unknown(name, slots))
        return await server.predict(request, [slots[name]], several=False, as_picture=picture)

    @app.post(
        "/predict", openapi_extra=body, responses=answers, summary="Ask several models at once"
    )
    async def predict_several(
        request: Request,
        model: Annotated[list[str] | None, Query(description="which; without it all")] = None,
        picture: picture = False,
    ) -> Response:
        names = list(dict.fromkeys(model or slots))
        if unknown := [name for name in names if name not in slots]:
            return await server._refused(request, "unknown", _unknown(unknown[0], slots))
        asked = [slots[name] for name in names]
        return await server.predict(request, asked, several=True, as_picture=picture)

    @app.get("/models", summary="What is served, and what each model reads")
    async def models() -> dict[str, Any]:
        return {
            "models": [{"ref": slot.ref, **slot.loaded.about()} for slot in slots.values()],
            "scenes": server.root is not None,
            "limits": vars(server.limits),
        }

    @app.get("/health", summary="Whether the server lives")
    async def health() -> Response:
        return _state(server.engine.alive, "alive", "the models' thread has ended")

    @app.get("/ready", summary="Whether it takes requests")
    async def ready() -> Response:
        return _state(server.engine.alive and not server.ending, "ready", "not ready")

    @app.get("/metrics", summary="Figures for Prometheus")
    async def metrics() -> Response:
        return Response(server.measures.text(), media_type="text/plain; version=0.0.4")

    def page(name: str) -> Callable[[], Awaitable[Response]]:
        text = (Path(__file__).parent / name).read_text()

        async def shown() -> Response:
            return HTMLResponse(text, headers={"Content-Security-Policy": PAGE_POLICY})

        return shown

    app.get("/", include_in_schema=False)(page("page.html"))
    app.get("/docs", include_in_schema=False)(page("docs.html"))

    @app.exception_handler(HTTPException)
    async def of_routes(_: Request, error: HTTPException) -> Response:
        return refusal(error.status_code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    async def of_queries(_: Request, error: RequestValidationError) -> Response:
        return refusal(422, str(error.errors()[0]["msg"]))

    return Guard(app, token, host)


Scope = MutableMapping[str, Any]


class Guard:
    """Who may ask: bearers of the token, where there is one.

    Without one a server on the loopback address answers under its own names alone: so no page of
    another site, whose name was pointed here, can ask it.
    """

    def __init__(self, app: Any, token: str | None, host: str) -> None:
        self.app = app
        self.token = None if token is None else f"Bearer {token}".encode()
        self.names = LOOPBACK if token is None and host in LOOPBACK else None

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and (refused := self._refused(scope)) is not None:
            if not await _linger(Request(scope, receive)):
                refused.headers["Connection"] = "close"
            await refused(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _refused(self, scope: Scope) -> Response | None:
        headers = dict(scope["headers"])
        if self.names is not None:
            host = headers.get(b"host", b"").decode("latin-1")
            if host.rsplit(":", 1)[0].strip("[]") not in self.names:
                return refusal(
                    421,
                    "asked under another name: this server has no token, and answers as localhost",
                )
        if self.token is None or scope["path"] in FREE:
            return None
        if hmac.compare_digest(headers.get(b"authorization", b""), self.token):
            return None
        refused = refusal(401, "Authorization: Bearer TOKEN is needed")
        refused.headers["WWW-Authenticate"] = "Bearer"
        return refused


def _given(body: bytes) -> dict[str, bytes | SceneOf]:
    """The images of a JSON body; the only one of `image` under an empty name."""
    try:
        asked = Asked.model_validate_json(body)
    except ValidationError as error:
        # Of what is neither text nor a scene, what the scene lacks.
        first = max(error.errors(), key=lambda one: len(one["loc"]))
        parts = [str(part) for part in first["loc"] if part not in ("str", "SceneOf")]
        where = ".".join(parts)[:100]
        raise Refused(422, f"JSON: {where + ': ' if where else ''}{first['msg'][:200]}") from None
    given = asked.images if asked.images is not None else {"": asked.image}
    found: dict[str, bytes | SceneOf] = {}
    for name, one in given.items():
        assert one is not None
        try:
            found[name] = one if isinstance(one, SceneOf) else base64.b64decode(one, validate=True)
        except (binascii.Error, ValueError):
            raise Refused(422, f"JSON: {name or 'image'} is no base64") from None
    return found


def _grouped(inputs: list[tuple[Loaded, Prepared]]) -> list[Group]:
    """Models with the same encoder that read the same pixels, together."""
    groups: list[tuple[list[Loaded], Prepared]] = []
    for model, image in inputs:
        for group, other in groups:
            if group[0].shared is model.shared and other.same_as(image):
                group.append(model)
                break
        else:
            groups.append(([model], image))
    return [(tuple(group), image) for group, image in groups]


def _content(
    loaded: list[Loaded],
    told: Mapping[Loaded, Any],
    inputs: Mapping[Loaded, Prepared],
    pictures: Mapping[str, Picture],
    form: str,
    several: bool,
    as_picture: bool,
) -> bytes:
    own = {model: at_own_pixels(told[model], inputs[model]) for model in loaded}
    if form != formats.JSON or not (several or as_picture):
        return formats.written(form, loaded[0], own[loaded[0]], pictures)
    answers = {model.name: formats.as_json(model, own[model]) for model in loaded}
    answer: dict[str, Any] = {"answers": answers} if several else answers[loaded[0].name]
    if as_picture:
        answer["images"] = formats.shown(loaded, pictures)
    return json.dumps(answer, ensure_ascii=False).encode()


async def _linger(request: Request) -> bool:
    """Read on for a moment: whoever is still sending would otherwise not hear the answer.

    Returns:
        Whether the body came to its end.
    """
    size = 0
    try:
        async with asyncio.timeout(LINGER_S):
            async for part in request.stream():
                size += len(part)
                if size > LINGER_BYTES:
                    return False
    except (TimeoutError, ClientDisconnect):
        return False
    except RuntimeError:  # it was read already
        return True
    return True


def _unknown(name: str, slots: Mapping[str, Slot]) -> Refused:
    return Refused(404, f"no model {name[:100]!r} here: there are {', '.join(slots)}")


def _state(good: bool, yes: str, no: str) -> Response:
    return (
        refusal(503, no)
        if not good
        else Response(f'{{"status":"{yes}"}}', media_type="application/json")
    )


def refusal(status: int, text: str, *, close: bool = False) -> Response:
    headers = {"Retry-After": "1"} if status in (429, 503) else {}
    if close:  # else the rest of a body would be read, and thrown away, for as long as it comes
        headers["Connection"] = "close"
    content = json.dumps({"error": text, "status": status}, ensure_ascii=False)
    return Response(content, status, media_type="application/json", headers=headers)
