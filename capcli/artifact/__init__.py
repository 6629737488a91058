"""The file format, with numpy alone: entries and their limits, codings, writer, reader; docs/format.md specifies it."""
