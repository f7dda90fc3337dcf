variable "vault_address" {
  description = "OpenBao server address"
  type        = string
  default     = @bao_address@
}

variable "forgejo_runner_token" {
  description = "Registration token of the container-based Forgejo runner (actions1)"
  type        = string
  default     = "PLACEHOLDER"
  sensitive   = true
}
