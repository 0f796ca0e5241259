"""policy_loss"""
