"""Tables and figures of the papers as entries of files, their runs, and the claims that results decide."""
