"""Files that ask a demuxer to read something else: another file of this machine, or an address."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path


def _box(content: bytes) -> bytes:
    return struct.pack(">I", len(content) + 4) + content


def outside_reference(whole: Path, path: Path, decoy: Path) -> Path:
    """A mov whose samples are in another file: its data reference is a Macintosh alias of `decoy`, next to it.

    QuickTime File Format, "Data Reference Atoms"; laid out as FFmpeg reads it (libavformat/mov.c, `enable_drefs`).
    """
    shutil.copy(whole, decoy)
    content = bytearray(whole.read_bytes())
    name = decoy.name.encode()
    target = b":" + name
    alias = bytes(10) + b"\0" + bytes(27) + bytes(12) + bytes([len(name)]) + name.ljust(63, b"\0") + bytes(16)
    alias += struct.pack(">HH", 1, 1) + bytes(16)
    alias += struct.pack(">HH", 2, len(target)) + target + bytes(len(target) % 2) + struct.pack(">HH", 0xFFFF, 0)
    entry = _box(b"alis" + bytes(4) + alias)
    at = content.index(b"url \0\0\0\x01") - 4
    content[at : at + 12] = entry
    for name_of_box in (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"):
        start = content.rindex(name_of_box, 0, at) - 4
        size = int.from_bytes(content[start : start + 4], "big")
        content[start : start + 4] = struct.pack(">I", size + len(entry) - 12)
    path.write_bytes(bytes(content))
    return path


def texts(decoy: Path, port: int) -> dict[str, bytes]:
    """Playlists in every format that FFmpeg knows, each naming a local video or an address."""
    url = f"http://127.0.0.1:{port}/x.mp4"
    hls = f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:1,\n{decoy}\n#EXTINF:1,\n{url}\n#EXT-X-ENDLIST\n".encode()
    dash = (
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet>'
        f'<Representation id="1" bandwidth="1"><BaseURL>{url}</BaseURL></Representation></AdaptationSet></Period></MPD>'
    ).encode()
    return {
        "hls.mp4": hls,
        "hls_bom.mp4": b"\xef\xbb\xbf" + hls,
        "hls_space.mp4": b"\n \t" + hls,
        "hls_nul.mp4": b"\0\0" + hls,
        "hls_binary.mp4": hls + bytes(range(256)),
        "hls_after_ftyp.mp4": struct.pack(">I", 16) + b"ftypisom\0\0\0\0" + hls,
        "concat.mp4": f"ffconcat version 1.0\nfile '{decoy}'\nfile '{url}'\n".encode(),
        "concat_nul.mp4": f"ffconcat version 1.0\nfile '{decoy}'\n\0".encode(),
        "dash.mpd.mp4": dash,
        "sdp.mp4": f"v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video {port} RTP/AVP 96\n".encode(),
        "asx.mp4": f'<ASX version="3.0"><ENTRY><REF HREF="{url}"/></ENTRY></ASX>'.encode(),
        "rtsp.mp4": f"RTSPtext\nrtsp://127.0.0.1:{port}/x\n".encode(),
        "ram.mp4": f"{url}\n".encode(),
        "imf.mp4": f'<?xml version="1.0"?><CompositionPlaylist><Uri>{url}</Uri></CompositionPlaylist>'.encode(),
        "aviindex.mp4": f"!BDX\0{decoy}\0".encode(),
    }


def names(decoy: Path, port: int) -> list[str]:
    """File names that a careless reader takes for addresses, protocols, patterns or options."""
    other = decoy.name
    return [
        f"http:__127.0.0.1:{port}_x.mp4",
        f"concat:{other}|{other}",
        f"file:{other}",
        f"subfile,,start,0,end,0,,:{other}",
        "pipe:0",
        "data:video_mp4;base64,AAAA",
        "frame%03d.mp4",
        "*.mp4",
        "-i.mp4",
        "--decoder=pyav.mp4",
        "|cat.mp4",
        "$(touch x).mp4",
        "new\nline.mp4",
        "tab\tand\x1b[31mred.mp4",
        "quote'\".mp4",
        " leading and trailing .mp4 ",
        "%2Fetc%2Fpasswd.mp4",
    ]
