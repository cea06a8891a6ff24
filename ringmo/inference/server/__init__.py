"""The HTTP server: images in, answers of registered models out. `ringmo serve` runs it.

app.py       what is asked for where, who may, and what is refused
images.py    bodies and references to pixels; all that is read for strangers
batching.py  requests to batches, and the one thread that the models run in
models.py    which versions answer, and the change from one to the next
formats.py   answers as JSON, GeoJSON, PNG and GeoTIFF
running.py   from the command line to a clean end
"""
