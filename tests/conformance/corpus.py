"""Hard video files, each with the frames, times, rotation or error that are right, and the evidence for that.

Every file is made from numbered frames (`tests.zoo.make`), so that a reader can be asked which frames it returned. The
frames are at 25 per second unless a case says otherwise. `python -m tests.conformance` runs readers over all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.bitstream import BitStreamFilterContext

from tests.conformance import edits
from tests.zoo import make

QUICK = {"preset": "ultrafast", "bf": "0"}
N = 24  # frames of a case


@dataclass(frozen=True, slots=True)
class Case:
    """One file. `frames` are the numbers that are shown, in order; empty if it must fail for one of `reasons`.

    `turn` is the rotation in degrees clockwise with which players show it; `duration_s` and `fps` are those of the
    frames. `kept` is how many frames before the damage or cut may be used on request (`--partial keep`).
    """

    name: str
    build: Callable[[Path], object]
    evidence: str
    frames: Sequence[int] = range(N)
    reasons: tuple[str, ...] = ()
    turn: int = 0
    duration_s: float = N / 25
    fps: float = 25.0
    kept: int = 0


def _h264(path: Path, n_frames: int = N, **options: object) -> Path:
    settings = {"options": QUICK, "gop": 8, "noise": 20} | options
    return make.video(path, "libx264", n_frames, **settings)  # type: ignore[arg-type]


def _then(build: Callable[[Path], object], *steps: Callable[[Path], object]) -> Callable[[Path], None]:
    def made(path: Path) -> None:
        build(path)
        for step in steps:
            step(path)

    return made


def _made(codec: str, **options: object) -> Callable[[Path], object]:
    return lambda path: make.video(path, codec, N, **options)  # type: ignore[arg-type]


def _cut(share: float) -> Callable[[Path], None]:
    return lambda path: edits.keep(path, share)


def _padded(byte: bytes, n_bytes: int) -> Callable[[Path], None]:
    return lambda path: edits.append(path, byte * n_bytes)


def _samples(change: Callable[[bytes, list[edits.Sample]], list[edits.Sample]], name: str) -> Callable[[Path], None]:
    """An H.264 file whose samples are changed; `change` gets the parameter sets and all samples."""

    def made(path: Path) -> None:
        source = _h264(path.with_name("source.mp4"))
        sets = edits.parameter_sets(source)
        edits.remuxed(source, path, lambda samples: change(sets, samples), name)
        source.unlink()

    return made


def _with_extra(at: int, extra: Callable[[bytes], bytes], name: str = "mp4") -> Callable[[Path], None]:
    return _samples(lambda sets, samples: [*samples[:at], (extra(sets), False), *samples[at:]], name)


SEI = edits.nal(6, b"\x05\x10" + bytes(range(16)) + b"\x80")
FILLER = edits.nal(12, b"\xff" * 40 + b"\x80")
DELIMITER, END_OF_SEQUENCE = edits.nal(9, b"\xf0"), edits.nal(10)


def _colours(
    codec: str, matrix: int, primaries: int = 1, transfer: int = 1, **options: object
) -> Callable[[Path], None]:
    def made(path: Path) -> None:
        with make.usual_priority(), av.open(str(path), "w") as output:
            stream = output.add_stream(codec, rate=25, options=dict(options.get("options", {})))  # type: ignore[call-overload]
            stream.height, stream.width = 96, 192
            stream.pix_fmt = str(options.get("pixel_format", "yuv420p"))
            context = stream.codec_context
            context.colorspace, context.color_primaries, context.color_trc = matrix, primaries, transfer
            for number in range(N):
                frame = av.VideoFrame.from_ndarray(make.picture(number, 96, 192), format="rgb24")
                frame = frame.reformat(format=stream.pix_fmt)
                frame.colorspace, frame.color_primaries, frame.color_trc = matrix, primaries, transfer
                frame.pts = number
                output.mux(stream.encode(frame))
            output.mux(stream.encode())

    return made


def _two_tracks(n_first: int, hw_first: tuple[int, int], n_second: int, codec: str = "mjpeg") -> Callable[[Path], None]:
    """A track of `n_first` pictures that all show number 999, then one of `n_second` numbered frames, 96x192."""

    def made(path: Path) -> None:
        with make.usual_priority(), av.open(str(path), "w") as output:
            tracks = []
            for name, (height, width), pixels in ((codec, hw_first, "yuvj420p"), ("libx264", (96, 192), "yuv420p")):
                stream = output.add_stream(name, rate=25, options=QUICK if name == "libx264" else {})
                stream.height, stream.width = height, width
                stream.pix_fmt = pixels if name == "mjpeg" or pixels == "yuv420p" else "yuv420p"
                tracks.append(stream)
            for stream, n_frames in zip(tracks, (n_first, n_second), strict=True):
                for number in range(n_frames):
                    shown = 999 if stream is tracks[0] else number
                    pixels_HWC = make.picture(shown, stream.height, stream.width)
                    frame = av.VideoFrame.from_ndarray(pixels_HWC, format="rgb24")
                    frame.pts, frame.time_base = number, Fraction(1, 25)
                    output.mux(stream.encode(frame))
                output.mux(stream.encode())

    return made


def _first_fragment_in_moov(path: Path) -> None:
    _h264(path, muxer={"movflags": "frag_keyframe"})


def _cut_in(name: bytes, at: int, share: float) -> Callable[[Path], None]:
    """Cut an MP4 file inside its box `name` number `at`."""

    def cut(path: Path) -> None:
        data = path.read_bytes()
        start, end = [(start, end) for kind, start, end in edits.boxes(data) if kind == name][at]
        edits.keep_to(path, start + 8 + int((end - start - 8) * share))

    return cut


def _turned_by_message(path: Path) -> None:
    """H.264 with a display orientation message (ITU-T H.264, D.1.27) that turns by 180 degrees."""
    source = _h264(path.with_name("source.mp4"))
    with av.open(str(source)) as container, av.open(str(path), "w") as output:
        stream = container.streams.video[0]
        turn = BitStreamFilterContext("h264_metadata=display_orientation=insert:rotate=180", stream)
        copy = output.add_stream_from_template(stream)
        for packet in container.demux(stream):
            for changed in turn.filter(packet if packet.size else None):
                changed.stream = copy
                output.mux(changed)
    source.unlink()


def _damaged_index(path: Path) -> None:
    make.video(path, "mpeg4", N, gop=12, noise=20)
    data = bytearray(path.read_bytes())
    at = data.index(b"idx1") + 8
    rng = np.random.default_rng(0)
    for entry in range(at, len(data) - 15, 16):
        data[entry + 8 : entry + 12] = rng.bytes(4)
    path.write_bytes(data)


def _joined_with_gap(path: Path) -> None:
    """Two recordings in one transport stream, whose times are ten hours apart."""
    times = [*range(12), *range(900_000, 900_012)]
    make.video(path, "libx264", N, options=QUICK, gop=12, pts=times)


def _encrypted_webm(path: Path) -> None:
    make.video(path, "libvpx-vp9", N, options={"deadline": "realtime"}, gop=8)
    key = b"\x47\xe2\x84" + b"key1"  # ContentEncKeyID
    algorithm = b"\x47\xe1\x81\x05"  # ContentEncAlgo: AES
    encryption = b"\x50\x35" + bytes([0x80 | len(key + algorithm)]) + algorithm + key
    encoding = b"\x50\x33\x81\x01" + encryption  # ContentEncodingType: encryption
    content = b"\x62\x40" + bytes([0x80 | len(encoding)]) + encoding
    edits.insert_into_track(path, b"\x6d\x80" + bytes([0x80 | len(content)]) + content)


def _long_subtitle(path: Path) -> None:
    """The container lasts 27 hours; the video 0.96 s."""
    _h264(path)
    edits.set_matroska_duration(path, 27 * 3600 * 1000.0)


def _cropped_matroska(path: Path) -> None:
    _h264(path)
    edits.insert_into_track(path, b"\x54\xaa\x81\x10", inside=b"\xe0")  # PixelCropBottom: 16


def _field_duration(path: Path) -> None:
    """A Matroska file whose DefaultDuration is that of a field, half a frame."""
    _h264(path)
    data = bytearray(path.read_bytes())
    at = data.index(b"\x23\xe3\x83")
    length = data[at + 3] & 127
    value = int.from_bytes(data[at + 4 : at + 4 + length], "big")
    data[at + 4 : at + 4 + length] = (value // 2).to_bytes(length, "big")
    path.write_bytes(data)


def _raw_30(path: Path) -> None:
    make.video(path, "libx264", N, options=QUICK, gop=8, container="h264", ticks_per_s=30)


def _units_in_a_unit(path: Path) -> None:
    """Samples as some phones write them: a unit of type 14 with a length, and the others in it, after start codes."""

    def wrapped(sample: bytes) -> bytes:
        content, at = b"\x0e\x83\x80\x6f", 0
        while at < len(sample):
            length = int.from_bytes(sample[at : at + 4], "big")
            content += b"\0\0\0\1" + sample[at + 4 : at + 4 + length]
            at += 4 + length
        return len(content).to_bytes(4, "big") + content

    source = _h264(path.with_name("source.mp4"))
    edits.remuxed(source, path, lambda samples: [(wrapped(data), is_key) for data, is_key in samples])
    source.unlink()


def _two_intervals(path: Path) -> None:
    """Frames that are 2 and 6 ticks apart in turn, at 100 ticks per second."""
    times = [8 * (number // 2) + 2 * (number % 2) for number in range(N - 1)]
    make.video(path, "libx264", N - 1, options=QUICK, gop=8, pts=times, ticks_per_s=100)


def _cut_bytes(n_bytes: int) -> Callable[[Path], None]:
    """Cut so many bytes off the end."""
    return lambda path: edits.keep_to(path, path.stat().st_size - n_bytes)


def _cut_after_moof(path: Path) -> None:
    _h264(path, **FRAGMENTS)
    edits.keep_to(path, [end for kind, _, end in edits.boxes(path.read_bytes()) if kind == b"moof"][1])


def _cut_in_tag_header(path: Path) -> None:
    """An FLV file of which 5 bytes of a tag are there: its header has 11."""
    make.video(path, "flv", N, gop=8, noise=20)
    data, at = path.read_bytes(), 13
    for _ in range(12):
        at += 15 + int.from_bytes(data[at + 1 : at + 4], "big")
    edits.keep_to(path, at + 5)


def _not_coded(n_frames: int, at: int) -> Callable[[Path], None]:
    """MPEG-4 in which a VOP that is not coded stands before frame `at`: the frame before stays on screen."""

    def made(path: Path) -> None:
        source = make.video(path.with_name("source.mp4"), "mpeg4", n_frames, gop=30)
        # type P, no second begins, marker, 5 bits of time, marker, not coded
        vop = b"\0\0\1\xb6" + bytes([0b01010000, 0b11001111])
        edits.remuxed(source, path, lambda samples: [*samples[:at], (vop, False), *samples[at:]])
        source.unlink()

    return made


def _slow(path: Path) -> None:
    """One frame every 12 s."""
    make.video(path, "libx264", N, options=QUICK, gop=8, pts=[12_000 * number for number in range(N)], ticks_per_s=1000)


def _letters_of_encryption(path: Path) -> None:
    """The metadata holds the letters of an encrypted track."""
    _h264(path, muxer={"movflags": "faststart"})
    path.write_bytes(path.read_bytes().replace(b"Lavf", b"encv"))


def _exif_jpegs(orientation: int) -> Callable[[Path], None]:
    def made(path: Path) -> None:
        source = make.video(path.with_name("source.mkv"), "mjpeg", N, pixel_format="yuvj420p")
        segment = edits.exif(orientation)
        edits.remuxed(source, path, lambda all_: [(edits.with_app1(d, segment), key) for d, key in all_], "matroska")
        source.unlink()

    return made


def _hidden_frame(path: Path) -> None:
    """VP8 whose frame 10 is hidden: later frames may refer to it (RFC 6386, 9.1: show_frame is 0)."""
    make.video(path, "libvpx", N, options={"deadline": "realtime"}, gop=8, noise=20)
    with av.open(str(path)) as container:
        frame = [bytes(packet) for packet in container.demux() if packet.size][10]
    data = bytearray(path.read_bytes())
    data[data.index(frame)] &= ~16
    path.write_bytes(data)


def _damaged(codec: str, number: int, **options: object) -> Callable[[Path], None]:
    share = options.pop("share", (0.4, 0.6))
    return _then(_made(codec, **options), lambda path: edits.overwrite_packet(path, number, share=share))  # type: ignore[arg-type]


def _first_frame_damaged(path: Path) -> None:
    make.video(path, "mjpeg", N, pixel_format="yuvj420p")
    edits.overwrite_packet(path, 0, share=(0.0, 0.9))


def _still(brand: bytes) -> Callable[[Path], None]:
    box = b"ftyp" + brand + bytes(4) + b"mif1" + brand
    content = (len(box) + 4).to_bytes(4, "big") + box + b"\0\0\0\x10mdat" + bytes(8)
    return lambda path: path.write_bytes(content)


ID3 = b"TAG" + b"A title".ljust(125, b"\0")  # ID3v1
TRUNCATED, CORRUPT = ("truncated",), ("corrupt_frames", "truncated")
FRAGMENTS = {"muxer": {"movflags": "frag_keyframe+empty_moov"}}
MJPEG = {"pixel_format": "yuvj420p"}
LIVE = {"muxer": {"live": "1"}, "container": "matroska"}

CASES = (
    # side data and colours
    Case("exif.mkv", _exif_jpegs(1), "24 JPEGs with EXIF data are 24 frames"),
    Case("exif_turned.mkv", _exif_jpegs(3), "the EXIF orientation 3 is a turn by 180 degrees", turn=180),
    Case(
        "matrix_ycgco.mp4", _colours("libx264", 8, options=QUICK), "FFmpeg's scaler has no YCgCo", (), ("unsupported",)
    ),
    Case("matrix_2020cl.mp4", _colours("libx264", 10, options=QUICK), "nor BT.2020 CL", (), ("unsupported",)),
    Case("matrix_reserved.mkv", _colours("mpeg2video", 3, 3, 3), "H.273 reserves 3: as where the stream is silent"),
    Case(
        "matrix_prores_0.mov",
        _colours("prores_ks", 0, 0, 0, pixel_format="yuv422p10le"),
        "0 means RGB, which YCbCr cannot be: as where the stream is silent",
    ),
    # tracks
    Case("still_first.mp4", _two_tracks(1, (96, 192), N), "a track of one picture is not the film"),
    Case("still_larger.mp4", _two_tracks(1, (192, 384), N), "however large it is"),
    Case("still_larger.mkv", _two_tracks(1, (192, 384), N), "in any container"),
    Case("avif.mp4", _still(b"avif"), "an AVIF picture under a video's name", (), ("not_a_video",)),
    Case("heic.mp4", _still(b"heic"), "an HEIC picture under a video's name", (), ("not_a_video",)),
    # cut files
    Case(
        "fragment_in_moov_cut_mdat.mp4",
        _then(_first_fragment_in_moov, _cut_in(b"mdat", 2, 0.5)),
        "the third mdat box needs bytes that are not there",
        (),
        TRUNCATED,
        kept=16,
    ),
    Case(
        "fragment_in_moov_cut_moof.mp4",
        _then(_first_fragment_in_moov, _cut_in(b"moof", 1, 0.5)),
        "the second moof box needs bytes that are not there",
        (),
        TRUNCATED,
        kept=16,
    ),
    Case(
        "cut_in_moov.mp4",
        _then(lambda path: _h264(path), _cut_in(b"moov", 0, 0.3)),
        "the index is cut",
        (),
        TRUNCATED,
    ),
    Case("cut.mxf", _then(_made("mpeg2video", gop=12, noise=20), _cut(0.5)), "no footer", (), TRUNCATED, kept=1),
    Case(
        "cut.ogg",
        _then(_made("libvpx", options={"deadline": "realtime"}, gop=8, noise=20), _cut(0.6)),
        "the last page does not end the stream",
        (),
        TRUNCATED,
        kept=1,
    ),
    Case("cut.gif", _then(_made("gif", pixel_format="rgb8"), _cut(0.6)), "no trailer", (), TRUNCATED, kept=1),
    Case("cut.mkv", _then(lambda path: _h264(path), _cut(0.97)), "the segment needs more bytes", (), TRUNCATED, kept=1),
    Case(
        "cut_live.mkv",
        _then(lambda path: _h264(path, **LIVE), _cut(0.6)),
        "the last block of a recording without a size needs more bytes",
        (),
        TRUNCATED,
        kept=1,
    ),
    Case(
        "cut.flv",
        _then(_made("flv", gop=8, noise=20), _cut(0.6)),
        "the last tag needs more bytes",
        (),
        TRUNCATED,
        kept=1,
    ),
    Case(
        "cut.wmv", _then(_made("wmv2", gop=8, noise=20), _cut(0.8)), "the data object needs more", (), TRUNCATED, kept=1
    ),
    Case(
        "cut.ivf",
        _then(_made("libvpx", options={"deadline": "realtime"}, gop=8, noise=20), _cut(0.6)),
        "the last frame needs more bytes",
        (),
        TRUNCATED,
        kept=1,
    ),
    Case(
        "cut.y4m",
        _then(_made("wrapped_avframe", container="yuv4mpegpipe"), _cut(0.6)),
        "the last frame is incomplete",
        (),
        TRUNCATED,
        kept=1,
    ),
    Case(
        "cut.rm",
        _then(_made("rv10", gop=8, noise=20), _cut_bytes(2444)),
        "the data chunk needs more bytes",
        (),
        TRUNCATED,
        kept=1,
    ),
    Case(
        "cut.dv",
        _then(_made("dvvideo", hw=(576, 720)), _cut(0.53)),
        "the last frame is incomplete",
        (),
        TRUNCATED,
        kept=12,
    ),
    Case(
        "cut_b_frames.mkv",
        _then(lambda path: _h264(path, options={"preset": "ultrafast", "bf": "2"}), _cut(0.57)),
        "a frame is stored whose predecessors are not",
        (),
        TRUNCATED,
        kept=8,
    ),
    Case(
        "cut_last_sample.mp4",
        _then(_made("mpeg4", gop=12, noise=20, muxer={"movflags": "faststart"}), _cut_bytes(5)),
        "the last frame is incomplete",
        (),
        TRUNCATED,
        kept=20,
    ),
    Case(
        "cut_last_cluster.mkv",
        _then(lambda path: _h264(path, muxer={"reserve_index_space": "1000"}), _cut(0.8)),
        "the cluster that is cut is the last element of its segment",
        (),
        TRUNCATED,
        kept=1,
    ),
    Case("cut_after_moof.mp4", _cut_after_moof, "a fragment has no data", (), TRUNCATED, kept=8),
    Case("cut_in_tag_header.flv", _cut_in_tag_header, "the header of a tag is cut", (), TRUNCATED, kept=8),
    Case("damaged_index.avi", _damaged_index, "all 24 frames are in the file; only its index is damaged"),
    # whole files that look cut
    Case(
        "duration_long.webm",
        _then(
            _made("libvpx", options={"deadline": "realtime"}, gop=8),
            lambda path: edits.set_matroska_duration(path, 1960.0),
        ),
        "all bytes of the segment are there; the recorder wrote the duration by its clock",
    ),
    Case("long_subtitle.mkv", _long_subtitle, "the video's own packets last 0.96 s"),
    Case(
        "zeros_behind.ts",
        _then(_made("mpeg2video", gop=12, noise=20), _padded(b"\0", 200_000)),
        "a transport stream followed by zeros",
    ),
    Case("ff_behind.ts", _then(_made("mpeg2video", gop=12), _padded(b"\xff", 200_000)), "or by 0xFF"),
    Case(
        "ff_behind_fragments.mp4",
        _then(lambda path: _h264(path, **FRAGMENTS), _padded(b"\xff", 1000)),
        "fragments followed by 0xFF",
    ),
    Case("zeros_behind_fragments.mp4", _then(lambda p: _h264(p, **FRAGMENTS), _padded(b"\0", 100_000)), "or by zeros"),
    Case(
        "zeros_behind.ogg",
        _then(_made("libvpx", options={"deadline": "realtime"}, gop=8), _padded(b"\0", 200_000)),
        "an Ogg file followed by zeros",
    ),
    Case("zeros_behind.mkv", _then(lambda path: _h264(path), _padded(b"\0", 100_000)), "a Matroska file"),
    Case(
        "ff_behind.ivf",
        _then(_made("libvpx", options={"deadline": "realtime"}, gop=8), _padded(b"\xff", 1000)),
        "an IVF file followed by 0xFF",
    ),
    Case("zeros_behind.dv", _then(_made("dvvideo", hw=(576, 720)), _padded(b"\0", 300_000)), "a DV file and zeros"),
    Case(
        "ff_behind.y4m",
        _then(_made("wrapped_avframe", container="yuv4mpegpipe"), _padded(b"\xff", 1000)),
        "a YUV4MPEG file and 0xFF",
    ),
    Case("three_ff_behind.mp4", _then(lambda path: _h264(path, **FRAGMENTS), _padded(b"\xff", 3)), "not a box"),
    Case("tag_behind_fragments.mp4", _then(lambda path: _h264(path, **FRAGMENTS), _padded(ID3, 1)), "not a box"),
    Case("tag_behind_live.mkv", _then(lambda path: _h264(path, **LIVE), _padded(ID3, 1)), "not an element"),
    Case("text_behind.flv", _then(_made("flv", gop=8), _padded(b"Recorded by camera 7\n", 5)), "not a tag"),
    Case("cut_in_cues.mkv", _then(lambda path: _h264(path), _cut_bytes(5)), "all frames precede the index"),
    # access units without a picture
    Case("parameter_sets_first.mp4", _with_extra(0, lambda sets: sets), "no slice", duration_s=N / 25),
    Case("delimiter_first.mp4", _with_extra(0, lambda sets: DELIMITER), "no slice"),
    Case("message_first.mkv", _with_extra(0, lambda sets: SEI, "matroska"), "no slice"),
    Case("message_last.mp4", _with_extra(N, lambda sets: SEI), "no slice"),
    Case("filler_last.mp4", _with_extra(N, lambda sets: FILLER), "no slice"),
    Case("filler_last.mkv", _with_extra(N, lambda sets: FILLER, "matroska"), "no slice"),
    Case("end_of_sequence_last.mp4", _with_extra(N, lambda sets: END_OF_SEQUENCE), "no slice"),
    Case("units_in_a_unit.mp4", _units_in_a_unit, "the slices are inside a unit of another type"),
    Case("not_coded.mp4", _not_coded(300, 100), "a VOP that is not coded", range(300), duration_s=301 / 25),
    Case("hidden_frame.webm", _hidden_frame, "frame 10 is not shown", (*range(10), *range(11, N))),
    # damage that FFmpeg names
    Case(
        "damaged_ffv1.mkv",
        _damaged("ffv1", 6, share=(0.4, 0.45), options={"level": "3", "slices": "4", "slicecrc": "1"}, noise=20),
        "the checksum of a slice is wrong",
        (),
        CORRUPT,
        kept=6,
    ),
    Case(
        "damaged.mjpeg.mov",
        _damaged("mjpeg", 6, noise=20, share=(0.1, 0.15), **MJPEG),
        "a scan is damaged",
        (),
        CORRUPT,
        kept=6,
    ),
    Case(
        "damaged_zmbv.avi",
        _damaged("zmbv", 6, noise=20, pixel_format="bgr0", share=(0.005, 0.02)),
        "not all of the compressed data is used",
        (),
        CORRUPT,
        kept=6,
    ),
    Case(
        "damaged_jpegls.avi",
        _damaged("jpegls", 6, noise=20, pixel_format="rgb24", share=(0.4, 0.45)),
        "a scan is damaged",
        (),
        CORRUPT,
        kept=6,
    ),
    Case(
        "damaged_cinepak.avi",
        _damaged("cinepak", 6, noise=20, pixel_format="rgb24", share=(0.5, 0.505)),
        "a strip cannot be decoded",
        (),
        CORRUPT,
        kept=6,
    ),
    Case(
        "damaged_dv.dv",
        _damaged("dvvideo", 6, hw=(576, 720), share=(0.3, 0.7)),
        "FFmpeg conceals blocks and says so",
        (),
        CORRUPT,
        kept=6,
    ),
    Case(
        "damaged_utvideo.avi",
        _damaged("utvideo", 6, noise=20, share=(0.1, 0.3)),
        "a slice does not end where it should",
        (),
        CORRUPT,
        kept=6,
    ),
    Case("first_frame_damaged.mov", _first_frame_damaged, "no frame comes before the damage", (), CORRUPT),
    # rates
    Case("rate_60000.dv", _made("dvvideo", hw=(576, 720)), "the frames are 1/25 s apart"),
    Case("rate_30_in_stream.h264", _raw_30, "the stream's own timing says 30", fps=30.0, duration_s=N / 30),
    Case(
        "rate_of_fields.mkv", _field_duration, "the frames are 40 ms apart, although each lasts 20 ms", duration_s=0.94
    ),
    Case(
        "rate_of_two_intervals.mp4",
        _two_intervals,
        "2 and 6 ticks of 10 ms, equally often: the median is 4",
        range(N - 1),
        duration_s=0.89,
    ),
    Case("rate_of_slow_pictures.mkv", _slow, "the frames are 12 s apart", duration_s=23 * 12 + 0.001, fps=1 / 12),
    # the rest
    Case("letters_of_encryption.mp4", _letters_of_encryption, "a text, not a track"),
    Case("turned_by_message.mp4", _turned_by_message, "a display orientation message", turn=180),
    Case("encrypted.webm", _encrypted_webm, "its track has a ContentEncryption element", (), ("unsupported",)),
    Case(
        "scrambled.ts",
        _then(_made("mpeg2video", gop=12, noise=20), lambda path: edits.scramble(path, 256)),
        "its packets are marked as scrambled",
        (),
        ("unsupported",),
    ),
    Case("gap_of_ten_hours.ts", _joined_with_gap, "two recordings, ten hours apart", duration_s=36000.48),
    Case("raw.mjpeg", _made("mjpeg", noise=20, **MJPEG), "JPEGs one after another"),
    Case("cropped.mkv", _cropped_matroska, "PixelCrop is not applied: all coded pixels are used"),
)
