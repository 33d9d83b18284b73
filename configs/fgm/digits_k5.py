# L_2 alone with five online updates a cycle
_base_ = 'digits.py'

train_cfg = dict(online_updates=5)
