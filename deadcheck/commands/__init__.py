"""The commands, one file each; they parse, call the library, print, and return an exit code."""
