"""Images: from the bytes of a file to the pixels that every model of an experiment sees.

`settings` says how pixels are made and needs no Pillow; `pixels` makes them.
"""
