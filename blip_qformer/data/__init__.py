"""Training pairs: photographs, filters, prompted context, shards, the stream."""
