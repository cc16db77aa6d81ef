"""The checks behind `medseg check`: everything that is wrong with a data set, told at once.

`rows` are the problems, `voxels` the numbers; `draft` reads the manifest, `case` each case's files,
`sides` tells left from right, `whole` looks at the data set as one, and `fix` corrects what leaves
no choice.
"""
