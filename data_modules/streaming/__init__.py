"""Documents of text files as streams with a position, for `data_modules.text_stream.TextStream`."""
