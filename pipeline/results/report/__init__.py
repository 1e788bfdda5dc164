"""Reports as one HTML file each, which needs no network and runs no script.

`p3d results report` shows what a job did:

    rows ──facts──> counts, histograms, failures, a sample of videos ──┐
         ──neighbours──> a few clips and similar ones ─────────────────┼─render─> page.html (Jinja2) ──> report.html
    footers, epochs (p3d.jobs.monitor.report) ──timeline──> RunFacts ──┤
    sources ──pictures──> thumbnails, if the sources still exist ──────┘

`p3d train` shows what a training run did:

    metrics of each step, accuracy of each evaluation ──curves──> plots ──────┐
    predictions of the test videos ──training──> confusions, classes, videos ─┴─> training.html ──> report.html

Jinja2 comes with torch and escapes every value (`template`). Both pages have the head and style of layout.html. The
plots are SVG written by the templates: those of a plotting library would be larger than all the rest, have no dark
mode, and no text for screen readers.
"""
