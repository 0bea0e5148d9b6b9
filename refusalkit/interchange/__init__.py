"""Read and write the files in which others keep directions.

A module a format reads a file into `content.Content`, in our conventions, and writes one from it. `formats.FORMATS` is
the table of them and says what each can express; `convert.convert` holds what the command does.
"""
