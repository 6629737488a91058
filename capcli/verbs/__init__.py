"""The four commands, one file each: a function with the command's name that yields events and returns the result."""
