"""A local page over a dataset, for `p3d results serve`: look for videos, see what is like them, play them.

    source ──once──> archive (columns of all videos) ──> plane (a 2-D map)        static/  what the browser gets
                         |                                  |                        |
    browser <── server (who may ask, what may be loaded) <── answers (JSON) <── similar, pictures, content

archive.py    every video and failure without its vectors, in memory: found by text and conditions
plane.py      vectors -> two coordinates and a cluster each
similar.py    what is like a video, a second of it, or a file that was dropped; stops when nobody waits any more
pictures.py   thumbnails, made apart and kept in a bounded folder
content.py    the bytes of one video of the dataset, proved to be the planned one, by ranges
answers.py    requests -> JSON, pictures, ranges of videos
server.py     the guard before all of them, and the life of the server

aiohttp is the server: it comes with ray[default], so that nothing is added to an installation, and parses HTTP in C
where the standard library's server is not meant for browsers. The page is plain JavaScript modules: no build step, no
network. Nothing here knows a network or the command line: how a file is embedded is passed in.
"""
