"""Run directories in, one report out. Reads files alone, and imports no torch.

reading.py      run directories -> ReportRun, whatever of them is there
panels.py       which curves there are, from which metrics, in which units
thinning.py     many points -> few, with every spike kept
headline.py     the last values of every run, with intervals
comparing.py    settings and environment side by side, with what differs
completions.py  the responses of the runs to one prompt side by side
document.py     all of it as one plain tree, `Report`, which knows no format
plots.py        the curves of a `Report` as Bokeh's JSON
page.py         a `Report` as one HTML file
plain.py        a `Report` as Markdown or JSON
"""
