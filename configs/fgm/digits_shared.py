# one forward of the online network serves both phases, for which their densities of t must be
# equal: 9 passes of a network in a cycle instead of 11; the quickstart's recipe. Not with FSDP2
_base_ = 'digits.py'

model = dict(fgm_time_sampler=dict(mean=0.5))
train_cfg = dict(share_velocity=True)
