"""A local web page over a dataset, for `p3d results serve`: search videos, find similar ones, play them.

    source ──once──> archive (columns of all videos) ──> projection (2-D map)     static/  what the browser gets
                         |                                  |                        |
    browser <── server (access checks, security headers) <── answers (JSON) <── similar, pictures, content

archive.py     every video and failure without its vectors, in memory, searchable by text and conditions
projection.py  vectors -> two coordinates and a cluster each
similar.py     what is similar to a video, a second of it, or a dropped file; stops when the client has gone
pictures.py    thumbnails, made in child processes and kept in a bounded folder
content.py     byte ranges of one video, verified to be the planned content
answers.py     requests -> JSON, pictures, ranges of videos
server.py      access checks for every request; start and end of the server

aiohttp is the server: ray[default] installs it anyway, and the standard library's server is not meant for browsers. The
page is plain JavaScript modules: no build step, no external requests. Nothing here imports a neural network or the
command line: the function that embeds a file is passed in.
"""
