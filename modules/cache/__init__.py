"""Below `KIVILatentCache`: layers that grow or have a capacity, blocks and their quantizers, files, model binding."""
