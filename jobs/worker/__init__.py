"""The actor that owns a device: decodes in tasks of their own, batches, the network, the commit."""
