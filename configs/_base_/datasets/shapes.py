# the problem: how large the images are, how many words a caption may have, and what is drawn
image_size = 32
max_words = 8
world = dict()
