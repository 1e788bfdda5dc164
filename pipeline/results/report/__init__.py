"""`p3d results report`: one HTML file that shows what a job did. It needs no network and runs no script.

    rows ──facts──> counts, histograms, failures, a sample of videos ──┐
         ──neighbours──> a few clips and similar ones ─────────────────┼─> page.html (Jinja2) ──> report.html
    footers, epochs (p3d.jobs.monitor.report) ──timeline──> RunFacts ──┤
    sources ──pictures──> thumbnails, if the sources still exist ──────┘

Jinja2 comes with torch and escapes every value. The plots are SVG written by the template: those of a plotting library
would be larger than all the rest, have no dark mode, and no text for screen readers.
"""
