"""`p3d results report`: one HTML file that says what a job did, for people; it needs no network and runs no script.

    rows ──facts──> counts, histograms, failures, a sample of videos ──┐
         ──neighbours──> a few clips and what is like them ────────────┼─> page.html (Jinja2) ──> report.html
    footers, epochs (p3d.jobs.monitor.report) ──timeline──> RunFacts ───────────┤
    sources ──pictures──> thumbnails, where they are still there ──────┘

Jinja2 comes with torch. It escapes every value, and the plots are SVG that it fills in: a plotting library's would be
larger than all the rest, know no dark mode, and have no text that a screen reader finds.
"""
