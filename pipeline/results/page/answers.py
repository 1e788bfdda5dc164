"""Requests -> responses. Blocking work runs in a few small thread pools, and ends early if the client has gone.

    api/about  api/videos  api/video  api/similar  api/map  api/frames  api/drop     JSON
    picture                                                                          JPEG of one second of a video
    content                                                                          the video itself, by ranges

A video is named by its `video_id` in the query string and looked up in the archive; no part of a URL is ever a path.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from aiohttp import web

from p3d.pipeline.decode.child import end_children
from p3d.pipeline.errors import (
    BadVideo,
    InputError,
    JobError,
    Reason,
    StoreError,
    VideoError,
    meaning_of,
)
from p3d.pipeline.results.page.archive import Archive
from p3d.pipeline.results.page.content import Content, open_content
from p3d.pipeline.results.page.opening import Opening, StillReading
from p3d.pipeline.results.page.pictures import Pictures
from p3d.pipeline.results.page.similar import Answer, Dropped, Embed, NobodyWaits, SimilarQuery, levels, similar
from p3d.pipeline.results.search.query import position_s
from p3d.pipeline.sources.below import SourceRule
from p3d.pipeline.storage.store import StoreOptions
from p3d.pipeline.types import Failure, VideoRef

T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

PAGE_VIDEOS = 60  # videos per page of a list by default; at most 10 times that
MOST_FRAMES = 24
CHUNK_BYTES = 1 << 20  # of a video at a time: one ranged GET if it is on S3
WAITING_DROPS = 3
SUFFIX = re.compile(r"\.[A-Za-z0-9]{1,8}")
VIDEO_TYPES = {
    **dict.fromkeys((".mp4", ".m4v"), "video/mp4"),
    ".mov": "video/quicktime",
    ".webm": "video/webm",
    ".mkv": "video/x-matroska",
    **dict.fromkeys((".ogv", ".ogg"), "video/ogg"),
    ".avi": "video/x-msvideo",
    **dict.fromkeys((".ts", ".m2ts", ".mts"), "video/mp2t"),
}


class Answers:
    """The request handlers of the page. `close` ends its child processes, and cancels queued work of its threads."""

    def __init__(
        self,
        opening: Opening,
        scratch: Path,
        options: StoreOptions,
        embed: Embed | None,
        dropped_bytes: int,
        rule: SourceRule,
    ) -> None:
        self.opening, self.scratch, self.options, self.rule = opening, scratch, options, rule
        self.embed, self.dropped_bytes, self.dropped = embed, dropped_bytes, Dropped()
        (scratch / "pictures").mkdir()
        self.pictures = Pictures(scratch / "pictures", options)
        self._searching = ThreadPoolExecutor(2, "search")
        self._looking = ThreadPoolExecutor(max(2, (os.cpu_count() or 2) // 2), "pictures")
        self._sending = ThreadPoolExecutor(8, "content")
        self._embedding = ThreadPoolExecutor(1, "embed")  # a network uses every core by itself
        self._drops = 0

    @property
    def archive(self) -> Archive:
        """StillReading until all rows are read."""
        return self.opening.archive()

    def close(self) -> None:
        self.opening.close()
        for pool in (self._searching, self._looking, self._sending, self._embedding):
            pool.shutdown(wait=False, cancel_futures=True)
        end_children()

    def routes(self, prefix: str) -> list[web.RouteDef]:
        found: dict[str, Handler] = {
            "api/about": self.about,
            "api/videos": self.videos,
            "api/video": self.video,
            "api/similar": self.similar,
            "api/map": self.map,
            "api/frames": self.frames,
            "picture": self.picture,
            "content": self.content,
        }
        gets = [web.get(f"{prefix}/{name}", _told(handler)) for name, handler in found.items()]
        return [*gets, web.post(f"{prefix}/api/drop", _told(self.drop))]

    async def about(self, _: web.Request) -> web.StreamResponse:
        return _json(await self._in(self._searching, self._about))

    def _about(self) -> dict[str, Any]:
        source = self.archive.source
        return {
            "out": source.store.url,
            "model": source.job.recipe.model,
            "weights": source.job.weights_origin,
            "clips": source.job.recipe.clips,
            "videos": self.archive.rows.num_rows - self.archive.n_failed,
            "failed": self.archive.n_failed,
            "pending": source.pending,
            "levels": list(levels(source)),
            "columns": [asdict(column) for column in self.archive.columns()],
            "drop_bytes": self.dropped_bytes if self.embed is not None else 0,
        }

    async def videos(self, request: web.Request) -> web.StreamResponse:
        query = request.query
        failed = {"": None, "yes": True, "no": False}[_one_of(query.get("failed", ""), ("", "yes", "no"))]
        cluster = int(_number(query["cluster"])) if "cluster" in query else None
        found = await self._in(
            self._searching, self.archive.find, query.get("text", ""), query.getall("where", []), cluster, failed
        )
        offset = max(0, int(_number(query.get("offset", "0"))))
        limit = min(10 * PAGE_VIDEOS, max(0, int(_number(query.get("limit", str(PAGE_VIDEOS))))))
        shown = self.archive.rows.take(found[offset : offset + limit])
        kept = "video_id path duration_s width height n_clips codec reason".split()
        return _json({"total": len(found), "offset": offset, "videos": shown.select(kept).to_pylist()})

    async def video(self, request: web.Request) -> web.StreamResponse:
        row = self._row(request)
        meaning, remedy = meaning_of(str(row["reason"])) if "reason" in row else (None, None)
        return _json({"video": row, "meaning": meaning, "remedy": remedy})

    async def similar(self, request: web.Request) -> web.StreamResponse:
        query, gone = request.query, threading.Event()
        asked = SimilarQuery(
            video_id=query.get("id"),
            dropped=query.get("dropped"),
            at_s=position_s(query["t"]) if "t" in query else None,
            level="clip" if _one_of(query.get("level", "video"), ("clip", "video")) == "clip" else "video",
            top=max(1, int(_number(query.get("top", "24")))),
            where=tuple(query.getall("where", [])),
            distinct=_number(query["distinct"]) if "distinct" in query else None,
            own=query.get("own") == "yes",
            every=query.get("every") == "yes",
        )
        try:
            found = await self._in(self._searching, similar, self.archive, asked, self.dropped, gone)
        finally:
            gone.set()
        return _json(_hits(found, asked))

    async def map(self, _: web.Request) -> web.StreamResponse:
        archive = self.opening.archive(mapped=True)
        projection, rows = archive.projection, archive.rows
        shown = rows.take(projection.rows_S).select(["video_id", "path", "duration_s"]).to_pydict()
        middles = rows.take(projection.middles_K)["video_id"].to_pylist()
        xy = [[round(value, 5) for value in axis] for axis in projection.xy_S2.T.tolist()]
        return _json(
            {
                "layout": projection.layout,
                "share": projection.share,
                "of": archive.rows.num_rows - archive.n_failed,
                "ids": shown["video_id"],
                "paths": shown["path"],
                "durations": shown["duration_s"],
                "x": xy[0],
                "y": xy[1],
                "cluster": projection.cluster_S.tolist(),
                "middles": middles,
            }
        )

    async def frames(self, request: web.Request) -> web.StreamResponse:
        """Make pictures of several seconds in one child process, and return the failure of each, or null."""
        seconds = [_number(text) for text in request.query.getall("t", [])][:MOST_FRAMES]
        found = await self._in(self._looking, self.pictures.of, self._ref(request), seconds)
        return _json({"failures": [_failure(one) if isinstance(one, Failure) else None for one in found]})

    async def picture(self, request: web.Request) -> web.StreamResponse:
        second = max(0.0, _number(request.query.get("t", "0")))
        (found,) = await self._in(self._looking, self.pictures.of, self._ref(request), [second])
        if isinstance(found, Failure):
            return _json(_failure(found), status=404)
        return web.Response(body=found, content_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})

    async def content(self, request: web.Request) -> web.StreamResponse:
        video = self._ref(request)
        opened: Content = await self._in(self._sending, open_content, video, self.options)
        last: Future[Any] = Future()
        last.set_result(None)
        response = web.StreamResponse()
        try:
            start, end = _headers(request, response, video, opened.size_bytes)
            await response.prepare(request)
            while start < end and request.method != "HEAD":
                last = self._sending.submit(opened.read, start, min(start + CHUNK_BYTES, end))
                piece = await asyncio.wrap_future(last)
                if not piece:  # the response cannot have the announced length
                    raise VideoError(Reason.SOURCE_CHANGED, "became shorter while it was read")
                await response.write(piece)
                start += len(piece)
            await response.write_eof()
        except ConnectionResetError:
            pass  # players close the connection when they have enough
        except (VideoError, StoreError):
            if not response.prepared:
                raise
            if request.transport is not None:
                request.transport.abort()  # headers are sent, so only a broken connection can report the error
        finally:
            last.add_done_callback(lambda _: opened.close())  # after the thread that reads it
        return response

    async def drop(self, request: web.Request) -> web.StreamResponse:
        """Receive a file up to the size limit, embed it and delete it. Returns a key for its vectors."""
        if self.embed is None:
            raise InputError(f"{self.archive.source.store.url} has no weights to embed a file with")
        if self._drops >= WAITING_DROPS:
            raise web.HTTPServiceUnavailable(text="other files are being embedded; try again when they are done\n")
        self._drops += 1
        path = self.scratch / f"dropped-{os.urandom(8).hex()}{_suffix(request.query.get('name', ''))}"
        try:
            await self._take_in(request, path)
            query = await self._in(self._embedding, self.embed, path)
        except BadVideo as error:
            raise VideoError(error.reason, error.detail) from None
        finally:
            self._drops -= 1
            path.unlink(missing_ok=True)
        end_s = query["video"].seconds[0][1]
        key = self.dropped.keep(query)
        return _json({"dropped": key, "clips": len(query["clip"].seconds), "duration_s": end_s})

    async def _take_in(self, request: web.Request, path: Path) -> None:
        limit = f"the limit is {self.dropped_bytes} bytes (--drop-limit)"
        if (request.content_length or 0) > self.dropped_bytes:
            raise VideoError(Reason.TOO_LARGE, f"has {request.content_length} bytes; {limit}")
        with path.open("xb") as file:
            async for piece in request.content.iter_chunked(CHUNK_BYTES):
                if file.tell() + len(piece) > self.dropped_bytes:
                    raise VideoError(Reason.TOO_LARGE, f"is too large to be dropped; {limit}")
                await self._in(self._sending, file.write, piece)

    def _row(self, request: web.Request) -> dict[str, object]:
        row = self.archive.row(request.query.get("id", ""))
        if row is None:
            raise InputError("there is no such video here")
        return row

    def _ref(self, request: web.Request) -> VideoRef:
        """The video of a request, from its row. Its size is 0, because videos/ does not have it.

        VideoError if it may not be opened.
        """
        row = self._row(request)
        video_id, path, uri, version = (str(row[name]) for name in ("video_id", "path", "uri", "version"))
        self.rule.check(uri)
        return self.archive.source.place(VideoRef(video_id, path, uri, version, size_bytes=0))

    async def _in(self, pool: ThreadPoolExecutor, function: Callable[..., T], *given: Any) -> T:
        """Run a function in a thread of a pool. It never starts if the request is cancelled before."""
        return await asyncio.wrap_future(pool.submit(function, *given))


def _told(handler: Handler) -> Handler:
    """Return errors as JSON, with the message that the command line would print."""

    async def answer(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except VideoError as error:
            return _json(_failure(Failure(error.reason, error.detail)), status=404)
        except StillReading as reading:
            return _json({"error": "the videos are still being read", "loading": reading.step}, status=503)
        except NobodyWaits:
            return _json({"error": "the client closed the request"}, status=499)
        except InputError as error:
            return _json({"error": str(error)}, status=400)
        except StoreError as error:
            return _json({"error": str(error)}, status=502)
        except JobError as error:
            return _json({"error": str(error)}, status=500)
        except (OSError, RuntimeError) as error:  # a full or failing disk, no process or thread could start
            return _json({"error": f"this machine cannot answer the request: {error}"}, status=507)

    return answer


def _hits(answer: Answer, asked: SimilarQuery) -> dict[str, Any]:
    found = answer.found
    names = "video_id path clip_index start_s end_s".split()
    hits = [
        {
            **{name: getattr(hit, name) for name in names},
            "cosine": hit.score,
            "query_start_s": answer.seconds[hit.query][0],
        }
        for hit in found.hits
    ]
    told: dict[str, Any] = {
        "level": asked.level,
        "rows": found.n_rows,
        "seconds": found.seconds,
        "indexed": found.n_indexed,
    }
    told |= {"query_vectors": len(answer.seconds), "cut_short": found.cut_short, "warning": found.warning}
    return {**told, "hits": hits}


def _failure(failure: Failure) -> dict[str, Any]:
    meaning, remedy = meaning_of(failure.reason)
    return {"reason": failure.reason, "detail": failure.detail, "meaning": meaning, "remedy": remedy}


def _headers(request: web.Request, response: web.StreamResponse, video: VideoRef, size: int) -> tuple[int, int]:
    """Set status and headers of a response with a video's bytes. Returns the range [start, end) to send."""
    etag = f'"{video.version}"'
    kind = VIDEO_TYPES.get(Path(video.path).suffix.lower(), "application/octet-stream")
    response.headers.update({"Accept-Ranges": "bytes", "ETag": etag, "Content-Type": kind})
    response.headers["Cache-Control"] = "private, no-cache"
    if any(one.value in ("*", video.version) for one in request.if_none_match or ()):
        response.set_status(304)
        return 0, 0
    wanted = _range(request, size, etag)
    start, end = wanted or (0, size)
    if wanted is not None:
        response.set_status(206 if start < end else 416)
        response.headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}" if start < end else f"bytes */{size}"
    response.content_length = end - start
    return start, end


def _range(request: web.Request, size: int, etag: str) -> tuple[int, int] | None:
    """The requested bytes [start, end); (size, size) if the range lies outside the content (RFC 9110, 14.2 and 14.4).

    None for the whole content, also if the range is not valid or is of another version.
    """
    if "Range" not in request.headers or request.headers.get("If-Range", etag) != etag:
        return None
    try:
        wanted = request.http_range
    except ValueError:
        return None
    if wanted.start is None or wanted.start >= size or (wanted.start < 0 and not size):
        return (size, size)
    start = max(0, size + wanted.start) if wanted.start < 0 else wanted.start
    return start, size if wanted.stop is None else min(wanted.stop, size)


def _suffix(name: str) -> str:
    suffix = Path(name).suffix
    return suffix if SUFFIX.fullmatch(suffix) else ""


def _one_of(text: str, choices: tuple[str, ...]) -> str:
    if text not in choices:
        raise InputError(f"{text!r} is not one of {', '.join(choices)}")
    return text


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not -1e15 < number < 1e15:
        raise InputError(f"{text!r} is not a number")
    return number


def _json(record: dict[str, Any], status: int = 200) -> web.Response:
    try:
        text = json.dumps(record, default=str, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(record), default=str, allow_nan=False)
    headers = {"Cache-Control": "no-store"}
    return web.Response(text=text, status=status, content_type="application/json", headers=headers)


def _finite(value: Any) -> Any:
    """The value with NaN and infinity as text, at any depth, because JSON has no numbers for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value
