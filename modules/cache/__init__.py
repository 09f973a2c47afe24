"""The packed cache of one layer: codecs, pool of blocks, growth, files."""
