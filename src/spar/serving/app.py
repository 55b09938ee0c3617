"""The routes: OpenAI's images, edits, chat and Responses, and reconstruction, all on one worker."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Collection, Sequence
from contextlib import asynccontextmanager, nullcontext
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Form, Request
from fastapi.responses import JSONResponse, Response
from PIL import Image
from starlette.requests import ClientDisconnect

from spar import __version__
from spar.inference.base import Pipeline
from spar.inference.notes import world_notes
from spar.serving import limits, schema
from spar.serving.adaptation import adapt_messages, note_header, sampling_notes, seed_header
from spar.serving.batching import reconstruct, sampling_jobs
from spar.serving.completions import RunningAnswer, completion, completion_chunks
from spar.serving.errors import ApiError, add_handlers, job_error
from spar.serving.gate import RequestGate
from spar.serving.image_body import images_response, reserve_images
from spar.serving.image_io import Decoders, read_image, read_messages
from spar.serving.image_stream import RunningImage, add_preview, image_events
from spar.serving.jobs import ChatJob, ImageJob
from spar.serving.metrics import ServerMetrics
from spar.serving.middleware import RequestGuardMiddleware
from spar.serving.overview import overview
from spar.serving.responses import ResponseObject, ResponseRequest, chat_messages, response_events, response_object
from spar.serving.streaming import JobStream
from spar.serving.worker import Stopped, Worker

FORM = Form(media_type="multipart/form-data")
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": schema.ErrorBody, "description": "The request cannot be fulfilled; 429: the server is busy, and "
            "Retry-After gives the seconds to wait"},
    "500": {"model": schema.ErrorBody, "description": "The server failed; its log has more"},
    "503": {"model": schema.ErrorBody, "description": "The request timed out, or the server is stopping"},
}  # fmt: skip
STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "Whole, or streamed"}
}


def create_app(
    worker: Worker, *, token: str | None, hosts: Collection[str] | None, timeout: float, page: FastAPI | None,
    gate: RequestGate,
) -> FastAPI:  # fmt: skip
    """Build the ASGI application, which starts and stops the worker.

    Args:
        worker: not started yet; its `observe` is set to the metrics.
        token: bearer token of every request except `/health`.
        hosts: allowed names of the Host header if there is no token, None for any.
        timeout: seconds that a request may wait and run.
        page: the web page's application, whose lifespan is this one's.
        gate: counts the requests and their memory.
    """
    metrics = ServerMetrics(lambda: worker.waiting)
    worker.observe = metrics.observe
    routes = Routes(worker, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        async with page.router.lifespan_context(page) if page else nullcontext():
            yield
        await asyncio.to_thread(worker.stop)
        routes.decoders.stop()

    app = FastAPI(
        title="SPAR", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None, responses=ERRORS,
        separate_input_output_schemas=False, redirect_slashes=False,
    )  # fmt: skip
    app.add_middleware(RequestGuardMiddleware, token=token, hosts=hosts, timeout=timeout, metrics=metrics, gate=gate)
    add_handlers(app)
    app.post("/v1/images/generations", response_model=schema.ImagesResponse, responses=STREAM)(routes.generations)
    app.post("/v1/images/edits", response_model=schema.ImagesResponse, responses=STREAM)(routes.edits)
    app.post("/v1/reconstruct", response_model=schema.ImagesResponse)(routes.reconstruct)
    app.post("/v1/chat/completions", response_model=schema.ChatCompletion, responses=STREAM)(routes.chat)
    app.post("/v1/responses", response_model=ResponseObject, responses=STREAM)(routes.responses)
    app.get("/v1/models", response_model=schema.ModelList)(routes.models)
    app.get("/v1/models/{name}", response_model=schema.ModelInfo)(routes.one_model)
    app.get("/health", response_model=schema.Health)(routes.health)
    app.get("/metrics", response_class=Response)(routes.tell_metrics)

    async def show() -> Response:
        return overview(app.openapi(), routes.served, page=page is not None)

    for path in ("/", "/docs"):
        app.get(path, include_in_schema=False)(show)
    return app


def served_name(pipe: Pipeline) -> str:
    """A model's name in requests: of hf://OWNER/NAME@COMMIT only what fits a path."""
    return (pipe.origin.get("model") or "spar").rpartition("/")[2]


class Routes:
    """What answers the requests: one worker, whose jobs they wait for."""

    def __init__(self, worker: Worker, metrics: ServerMetrics) -> None:
        self.worker, self.metrics = worker, metrics
        self.decoders = Decoders()
        names = [served_name(worker.pipe), *worker.others]
        self.served = {name: schema.ModelInfo(id=name, created=int(time.time())) for name in names}
        self.first = names[0]

    def _chosen(self, name: str | None) -> tuple[str, str | None, Pipeline]:
        """The model that a request names: its id, its name among the worker's others, and its pipeline.

        Raises:
            ApiError: 404 for a model that is not served.
        """
        if name is not None and name not in self.served:
            raise ApiError(404, f"model: expected {', '.join(self.served)}", param="model", code="model_not_found")
        other = None if name in (None, self.first) else name
        return other or self.first, other, self.worker.pipe_of(other)

    async def _answer(
        self, request: Request, pipe: Pipeline, jobs: list[ImageJob], size: tuple[int, int], kind: str | None,
        texts: Sequence[str] = (), images: Sequence[Image.Image] = (), notes: Sequence[str] = (),
    ) -> Response:  # fmt: skip
        """Run the jobs and encode their images, with warnings about the request's texts and images."""
        kind = kind or "png"
        reserve_images(request.state.lease, len(jobs), size, kind)
        warnings = await _race(request, asyncio.to_thread(world_notes, pipe, texts, images))
        self.worker.submit(*jobs)
        generated = await _finished(request, jobs)
        return await asyncio.to_thread(images_response, generated, kind, warnings, note_header(notes))

    async def _uploaded_image(self, request: Request, form: schema.EditForm | schema.ReconstructForm) -> Image.Image:
        """Decode a form's image, after checks of its fields and its model."""
        await _check_fields_unique(request)
        self._chosen(form.model)
        data = await form.image.read()
        return await _race(request, read_image(data, "image", request.state.lease, self.decoders))

    async def generations(self, request: Request, body: schema.GenerationRequest) -> Response:
        """Generate images from a prompt."""
        _, model, pipe = self._chosen(body.model)
        size = pipe.output_size(*schema.sides(body.size))
        if body.stream:
            return await self._streamed_image(request, body, size, None)
        jobs = sampling_jobs(pipe, body, size, model=model)
        notes = sampling_notes(body)
        return await self._answer(request, pipe, jobs, size, body.output_format, [body.prompt], notes=notes)

    async def _streamed_image(
        self, request: Request, body: schema.SamplingRequest, size: tuple[int, int], image: Image.Image | None
    ) -> Response:
        """Run the job of one image and stream it."""
        _, model, pipe = self._chosen(body.model)
        previews: asyncio.Queue[Image.Image | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def show(preview: Image.Image | None) -> None:
            loop.call_soon_threadsafe(add_preview, previews, preview)

        (job,) = sampling_jobs(pipe, body, size, image, model, show)
        kind = body.output_format or "png"
        reserve_images(request.state.lease, 1 + min(body.partial_images or 0, limits.MAX_UNREAD), size, kind)
        images = [] if image is None else [image]
        warnings = await _race(request, asyncio.to_thread(world_notes, pipe, [body.prompt], images))
        job.future.add_done_callback(lambda _: show(None))
        self.worker.submit(job)
        task: Literal["image_generation", "image_edit"] = "image_generation" if image is None else "image_edit"
        running = RunningImage(job, previews, task, kind, warnings)
        first = await _first_piece(request, running)
        events = image_events(running, first, request.state.deadline)
        return JobStream(events, job, note_header(sampling_notes(body)))

    async def edits(self, request: Request, form: Annotated[schema.EditForm, FORM]) -> Response:
        """Edit an image as the prompt says."""
        image = await self._uploaded_image(request, form)
        _, model, pipe = self._chosen(form.model)
        height, width = size = pipe.edited_size(image)
        if schema.sides(form.size) not in ((None, None), size):
            own = f"expected auto or {width}x{height}: an edit has its image's own proportions"
            raise ApiError(400, f"size: {own}, got {form.size}", param="size")
        if form.stream:
            return await self._streamed_image(request, form, size, image)
        jobs = sampling_jobs(pipe, form, size, image, model)
        notes = sampling_notes(form)
        return await self._answer(request, pipe, jobs, size, form.output_format, [form.prompt], [image], notes)

    async def reconstruct(self, request: Request, form: Annotated[schema.ReconstructForm, FORM]) -> Response:
        """Encode and decode an image with the unified tokenizer."""
        image = await self._uploaded_image(request, form)
        _, model, pipe = self._chosen(form.model)
        job = ImageJob(reconstruct, None, image, model=model)
        size = pipe.image_size, pipe.image_size
        return await self._answer(request, pipe, [job], size, form.output_format, images=[image])

    async def _start_answer(
        self, request: Request, body: schema.AnswerRequest, messages: Sequence[schema.Message], limit: int | None
    ) -> RunningAnswer:
        """Queue the answer to a conversation, of at most `limit` tokens if given."""
        name, model, pipe = self._chosen(body.model)
        adapted, notes = await _race(request, asyncio.to_thread(adapt_messages, pipe, messages))
        turns = await _race(request, read_messages(adapted, request.state.lease, self.decoders))
        pieces: asyncio.Queue[str | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def emit(piece: str | None) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        parts = [part for one in turns if isinstance(one["content"], list) for part in one["content"]]
        images = [part["image"] for part in parts if part["type"] == "image"]
        warnings = await _race(request, asyncio.to_thread(world_notes, pipe, images=images))
        temperature, top_p, seed = body.sampling()
        job = ChatJob(
            lambda pipe: pipe.chat(
                turns, max_new_tokens=limit, temperature=temperature, top_p=top_p, seed=seed, max_tiles=body.max_tiles
            ),
            emit, model,
        )  # fmt: skip
        job.future.add_done_callback(lambda _: emit(None))
        self.worker.submit(job)
        return RunningAnswer(job, pieces, name, warnings, {**note_header(notes), **seed_header(seed)})

    async def chat(self, request: Request, body: schema.ChatRequest) -> Response:
        """Answer the last message of a conversation, which may contain images; whole or streamed."""
        limit = body.max_completion_tokens or body.max_tokens
        answer = await self._start_answer(request, body, body.messages, limit)
        if not body.stream:
            (out,) = await _finished(request, [answer.job])
            return JSONResponse(completion(answer, out), headers=answer.headers)
        usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        first = await _first_piece(request, answer)
        events = completion_chunks(answer, first, usage, request.state.deadline)
        return JobStream(events, answer.job, answer.headers)

    async def responses(self, request: Request, body: ResponseRequest) -> Response:
        """Answer an input, text or a conversation, in the form of OpenAI's Responses; nothing is stored."""
        answer = await self._start_answer(request, body, chat_messages(body), body.max_output_tokens)
        if not body.stream:
            (out,) = await _finished(request, [answer.job])
            return JSONResponse(response_object(answer, body, out), headers=answer.headers)
        first = await _first_piece(request, answer)
        return JobStream(response_events(answer, body, first, request.state.deadline), answer.job, answer.headers)

    async def models(self) -> schema.ModelList:
        """The served models."""
        return schema.ModelList(data=[*self.served.values()])

    async def one_model(self, name: str) -> schema.ModelInfo:
        """One of the served models."""
        return self.served[self._chosen(name)[0]]

    async def health(self) -> Response:
        """Whether the worker accepts jobs; needs no token."""
        alive = self.worker.alive
        return JSONResponse({"status": "ok" if alive else "stopping"}, 200 if alive else 503)

    async def tell_metrics(self) -> Response:
        """Metrics in Prometheus' format."""
        return Response(self.metrics.text(), media_type="text/plain; version=1.0.0; charset=utf-8")


async def _check_fields_unique(request: Request) -> None:
    """Refuse a repeated field, of which a form would silently give the last value."""
    names = [name for name, _ in (await request.form()).multi_items()]
    for name in set(names):
        if names.count(name) > 1:
            raise ApiError(400, f"{name}: expected once", param=name)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _race(request: Request, work: Awaitable[Any]) -> Any:
    """Result of `work`, unless the client disconnects (ClientDisconnect) or the deadline is over (503)."""
    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        left = max(0, request.state.deadline - asyncio.get_running_loop().time())
        await asyncio.wait({task, leaving}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if task.cancelled():
            raise Stopped
        if task.done():
            return task.result()
        if leaving.done():
            raise ClientDisconnect
        raise ApiError(503)
    finally:
        leaving.cancel()
        task.cancel()
        del task, work  # their exception refers to this frame: all would stay until garbage is collected


async def _finished(request: Request, jobs: Sequence[ImageJob | ChatJob]) -> list[Any]:
    """Results of jobs, in order; the jobs are cancelled if the client disconnects or the time is over."""
    try:
        return await _race(request, asyncio.gather(*(asyncio.wrap_future(job.future) for job in jobs)))
    except (ApiError, ClientDisconnect, Stopped):
        raise
    except Exception as error:  # of a job
        raise job_error(error) from None
    finally:
        for job in jobs:  # no effect on finished jobs
            job.future.cancel()


async def _first_piece(request: Request, answer: RunningAnswer | RunningImage) -> Any:
    """The first piece of an answer or preview of an image; a failure before it gets an error status, not a stream."""
    try:
        first: Any = await _race(request, answer.pieces.get())
    except BaseException:
        answer.job.future.cancel()
        raise
    if first is None:
        try:
            answer.job.future.result()
        except Exception as error:
            raise job_error(error) from None
    return first
