# L_2 alone with five online updates a cycle
_base_ = 'fashion.py'

train_cfg = dict(online_updates=5)
