"""The actor that owns a device: decode tasks, batches, inference, the commit."""
