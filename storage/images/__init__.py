"""Images: turns a file's bytes into the pixels that every model of an experiment sees.

`settings` holds the settings and needs no Pillow; `pixels` decodes and converts.
"""
